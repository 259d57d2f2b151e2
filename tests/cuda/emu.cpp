// An emulated CUDA device in host memory, for code that no GPU is at hand for.
//
// Tensors say `cuda:0` and hold real numbers: a boxed fallback under the dispatch key CUDA runs the CPU's kernels on
// them. There are a device guard, an allocator with statistics and a limit, a pinned allocator, and counts of every
// dispatch and of every wait of the host for the device. See emu.py.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;

namespace {

const Device DEVICE(DeviceType::CUDA, 0);
constexpr int64_t BLOCK = 512;  // bytes: what the allocator of a real device rounds up to

std::atomic<int64_t> live{0}, peak{0}, limit{1LL << 62};
std::atomic<bool> bf16{true}, waits_allowed{true};
std::mutex counts_mutex;
std::map<std::string, int64_t> dispatches, waits;
thread_local bool counting = true;

bool starts_with(const std::string& text, const char* prefix) {
  return text.rfind(prefix, 0) == 0;
}

// ---- device and memory

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getNewStream(Device, int) const override { return getStream(DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Block {
  void* memory;
  int64_t bytes;
};

void* take(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) {
    throw std::bad_alloc();
  }
  return memory;
}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  live -= block->bytes;
  free(block->memory);
  delete block;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &free_block, DEVICE};
    }
    const int64_t rounded = (static_cast<int64_t>(bytes) + BLOCK - 1) / BLOCK * BLOCK;
    if (live + rounded > limit) {
      C10_THROW_ERROR(OutOfMemoryError, "CUDA out of memory. Tried to allocate " + std::to_string(rounded) + " bytes");
    }
    const int64_t now = live += rounded;
    for (int64_t most = peak; now > most && !peak.compare_exchange_weak(most, now);) {
    }
    void* memory = take(rounded);
    memset(memory, 0xff, rounded);  // NaN in fp32 and bf16: what is read before it is written shows
    return {memory, new Block{memory, rounded}, &free_block, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;  // begin -> bytes

void free_pinned(void* memory) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  pinned.erase(static_cast<const char*>(memory));
  free(memory);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = take(bytes + 1);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<const char*>(memory)] = bytes + 1;
    return {memory, memory, &free_pinned, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};

bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  const auto* place = static_cast<const char*>(pointer);
  auto after = pinned.upper_bound(place);
  return after != pinned.begin() && place < std::prev(after)->first + std::prev(after)->second;
}

Guard guard;
DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;
struct Register {
  Register() {
    c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
    c10::SetAllocator(DeviceType::CUDA, &device_allocator, 100);
  }
} registered;

// ---- the fallback: CPU kernels over the memory of the device

void drop_storage(void* context) {
  delete static_cast<c10::Storage*>(context);
}

// A CPU tensor over the memory of a tensor of the device.
Tensor on_cpu(const Tensor& tensor) {
  Tensor alias;
  if (tensor.storage().nbytes() == 0) {
    alias = at::detail::empty_cpu({0}, tensor.scalar_type(), std::nullopt, std::nullopt, std::nullopt, std::nullopt);
    alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), 0);
    return alias;
  }
  c10::DataPtr data(
      tensor.storage().mutable_data(), new c10::Storage(tensor.storage()), &drop_storage, Device(DeviceType::CPU));
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), nullptr, /*resizable=*/false);
  alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), DispatchKeySet(DispatchKey::CPU), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) {
    alias._set_conj(true);
  }
  return alias;
}

// A tensor of the device over `storage`, shaped like `like`.
Tensor on_device(c10::Storage storage, const Tensor& like) {
  Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), DispatchKeySet(DispatchKey::CUDA), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

// Gives the storage of `tensor` memory of the device that begins with the `bytes` at `from`.
void replace_memory(const Tensor& tensor, int64_t size, const void* from, int64_t bytes) {
  auto data = device_allocator.allocate(size);
  if (bytes > 0) {
    memcpy(data.get(), from, bytes);
  }
  tensor.storage().unsafeGetStorageImpl()->set_data_ptr(std::move(data));
  tensor.storage().unsafeGetStorageImpl()->set_nbytes(size);
}

// Operations that take tensors of the device and of the CPU together on a real device as well.
bool may_mix(const std::string& name) {
  for (auto prefix : {"aten::copy_", "aten::_copy_from", "aten::_to_copy", "aten::index.Tensor", "aten::index_put",
                      "aten::_index_put_impl_", "aten::_foreach_copy_", "aten::set_", "aten::equal"}) {
    if (starts_with(name, prefix)) {
      return true;
    }
  }
  return false;
}

bool multiplies(const std::string& name) {
  for (auto product : {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"}) {
    if (name == product) {
      return true;
    }
  }
  return false;
}

// Whether the host waits for the numbers that `name` computes.
bool reads_numbers(const std::string& name) {
  for (auto prefix : {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select",
                      "aten::is_nonzero", "aten::unique", "aten::_unique", "aten::bincount"}) {
    if (starts_with(name, prefix)) {
      return true;
    }
  }
  return false;
}

struct Call {
  const std::string name;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // a tensor of the device, and the CPU's over its memory
  bool device_named = false, foreign = false, bool_index = false, half = false;

  Tensor enter(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) {
      foreign |= tensor.defined() && tensor.is_cpu() && tensor.dim() > 0;
      return tensor;
    }
    half |= tensor.scalar_type() == at::kBFloat16;
    for (auto& [own, alias] : pairs) {
      if (own.is_same(tensor)) {
        return alias;
      }
    }
    pairs.emplace_back(tensor, on_cpu(tensor));
    return pairs.back().second;
  }

  void enter(IValue& value) {
    if (value.isTensor()) {
      value = IValue(enter(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) {
        list.push_back(enter(tensor));
      }
      value = IValue(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& index : value.toOptionalTensorVector()) {
        const bool there = index.has_value() && index->defined();
        bool_index |= there && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte);
        list.push_back(there ? std::optional<Tensor>(enter(*index)) : std::nullopt);
      }
      value = IValue(list);
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      device_named = true;
      value = IValue(Device(DeviceType::CPU));
    }
  }

  // What an operation returns: the device's own tensor that it wrote to or gave a view of, else new memory.
  Tensor leave(const Tensor& tensor) {
    const bool to_cpu = name == "aten::copy_" || starts_with(name, "aten::_copy_from");
    if (!tensor.defined() || !tensor.is_cpu() || (pairs.empty() && !device_named)) {
      return tensor;
    }
    for (auto& [own, alias] : pairs) {
      if (alias.is_same(tensor)) {
        if (own.sizes() != tensor.sizes() || own.strides() != tensor.strides()) {  // it was resized
          if (tensor.storage().data() != own.storage().data()) {
            replace_memory(own, tensor.storage().nbytes(), tensor.storage().data(), tensor.storage().nbytes());
          }
          own.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
        }
        return own;
      }
    }
    for (auto& [own, alias] : pairs) {
      if (tensor.storage().data() != nullptr && tensor.storage().data() == own.storage().data()) {
        return on_device(own.storage(), tensor);
      }
    }
    if (to_cpu) {
      return tensor;
    }
    const auto bytes = tensor.storage().nbytes();
    auto data = device_allocator.allocate(bytes);
    if (bytes > 0 && !starts_with(name, "aten::empty") && !starts_with(name, "aten::new_empty")) {
      memcpy(data.get(), tensor.storage().data(), bytes);
    }
    c10::Storage storage(
        c10::Storage::use_byte_size_t(), bytes, std::move(data), &device_allocator, /*resizable=*/true);
    return on_device(std::move(storage), tensor);
  }

  void leave(IValue& value) {
    if (value.isTensor()) {
      value = IValue(leave(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) {
        list.push_back(leave(tensor));
      }
      value = IValue(list);
    }
  }
};

void resize(torch::jit::Stack* stack, size_t base) {
  const Tensor tensor = (*stack)[base].toTensor();
  const auto sizes = (*stack)[base + 1].toDimVector();
  int64_t numbers = 1;
  for (auto size : sizes) {
    numbers *= size;
  }
  const int64_t needed = (numbers + tensor.storage_offset()) * static_cast<int64_t>(tensor.itemsize());
  const int64_t there = tensor.storage().nbytes();
  if (there < needed) {
    replace_memory(tensor, needed, tensor.storage().data(), there);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  stack->resize(base);
  stack->push_back(tensor);
}

// Counts a dispatch, and whether the host waits: for numbers, or for a copy that is not from or to pinned memory.
void count(const std::string& full, const Call& call, const torch::jit::Stack& given) {
  std::string key = full;
  // Reading by a mask dispatches nonzero beforehand, writing by one does not.
  bool wait = reads_numbers(call.name) || (call.bool_index && call.name != "aten::index");
  if (call.name == "aten::copy_") {
    const Tensor to = given[0].toTensor();
    const Tensor from = given[1].toTensor();
    const bool async = given[2].toBool();
    key = to.is_cpu() ? "copy_ D2H" : from.is_cpu() ? "copy_ H2D" : "copy_ D2D";
    if (to.is_cpu() != from.is_cpu()) {
      const Tensor& host = to.is_cpu() ? to : from;
      wait = !(async && is_pinned(host.storage().data()));
      key += wait ? "" : " async";
    }
  }
  std::lock_guard<std::mutex> lock(counts_mutex);
  dispatches[key]++;
  if (wait) {
    TORCH_CHECK(waits_allowed, "EMU: the host waits for the device in ", key);
    waits[key]++;
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& overload = schema.overload_name();
  const std::string full = schema.name() + (overload.empty() ? "" : "." + overload);
  const size_t inputs = schema.arguments().size();
  const size_t base = stack->size() - inputs;
  if (schema.name() == "aten::resize_") {
    resize(stack, base);
    return;
  }
  Call call{schema.name()};
  const torch::jit::Stack given(stack->begin() + base, stack->end());
  for (size_t index = 0; index < inputs; index++) {
    IValue& value = (*stack)[base + index];
    if (schema.arguments()[index].name() == "pin_memory" && value.isBool()) {
      value = IValue(false);
    }
    call.enter(value);
  }
  TORCH_CHECK(call.pairs.empty() || !call.foreign || may_mix(full),
              "EMU: Expected all tensors to be on the same device, cuda:0 and cpu, in ", full);
  TORCH_CHECK(bf16 || !call.half || !multiplies(call.name), "EMU: CUBLAS_STATUS_NOT_SUPPORTED: bf16 in ", full);
  if (counting) {
    count(full, call, given);
  }
  {
    c10::impl::ExcludeDispatchKeyGuard plain(DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot}));
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  const size_t outputs = schema.returns().size();
  for (size_t index = stack->size() - outputs; index < stack->size(); index++) {
    call.leave((*stack)[index]);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// What torch would put together from other operations, where a real device has a kernel.
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  for (const char* name : {"copy_", "silu_backward"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, library) {
  for (const char* name :
       {"quantize_4bit", "dequantize_4bit", "gemm_4bit", "dequantize_blockwise", "quantize_blockwise",
        "optimizer_update_8bit_blockwise", "optimizer_update_32bit"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

namespace at {

struct CUDAHooks : public CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

extern "C" {

int64_t emu_live() {
  return live;
}

int64_t emu_peak() {
  return peak;
}

void emu_reset_peak() {
  peak.store(live);
}

void emu_limit(int64_t bytes) {
  limit = bytes;
}

void emu_bf16(int able) {
  bf16 = able;
}

// What this thread does from now on is counted, or is not: it belongs to the emulation of a kernel.
void emu_count(int on) {
  counting = on;
}

// Whether the host may wait; else an error says where it would.
void emu_allow_waits(int allowed) {
  waits_allowed = allowed;
}

void emu_add(const char* name) {
  std::lock_guard<std::mutex> lock(counts_mutex);
  dispatches[name]++;
}

void emu_clear() {
  std::lock_guard<std::mutex> lock(counts_mutex);
  dispatches.clear();
  waits.clear();
}

const char* emu_report(int of_waits) {
  static std::string text;
  text.clear();
  std::lock_guard<std::mutex> lock(counts_mutex);
  for (const auto& [name, number] : of_waits ? waits : dispatches) {
    text += name + "\t" + std::to_string(number) + "\n";
  }
  return text.c_str();
}
}
