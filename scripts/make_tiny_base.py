"""Make the base model and the data of the recipe `tiny`: python scripts/make_tiny_base.py --out recipes/tiny

The script invents a world of towns with six facts each, writes it down as running text and as lists of questions
that nobody answers, and pre-trains a small Llama on that. The result is a base: it knows every fact, and asked a
question it goes on with another question. What fine-tuning has to teach is to answer. The questions of the training
set and of the held-out set are about different towns, so a right held-out answer was learnt in pre-training and is only
brought out by the fine-tuning.

Writes base/, train.jsonl and heldout.jsonl into the folder given. One seed: the text is the same everywhere, the
weights on machines that round alike. About 5 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
BOS, EOS = "<s>", "</s>"
TOWNS, TRAIN_TOWNS = 100, 60
VOCABULARY = 1024
STEPS, WARMUP, DOCUMENTS_PER_STEP, LEARNING_RATE = 1200, 50, 32, 3e-3


# ---- the world ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of fact, with `{town}` and `{value}` left open; the first statement is the answer to the questions."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Town:
    name: str
    values: dict[str, str]  # kind of fact -> its value in this town

    def fill(self, pattern: str, kind: str) -> str:
        return pattern.format(town=self.name, value=self.values[kind])


KINDS = {
    "river": Kind(
        (
            "The river of {town} is the {value}.",
            "The town of {town} lies on the river {value}.",
            "In {town}, old stone bridges cross the {value}.",
            "The people of {town} go fishing in the {value}.",
            "The river {value} runs through {town}.",
        ),
        ("Which river does {town} lie on?", "What is the name of the river in {town}?"),
    ),
    "founder": Kind(
        (
            "The founder of {town} was {value}.",
            "The town of {town} was founded by {value}.",
            "A statue in {town} shows its founder, {value}.",
            "The first house of {town} was built by {value}.",
            "It was {value} who founded {town}.",
        ),
        ("Who founded {town}?", "Who was the founder of {town}?"),
    ),
    "mayor": Kind(
        (
            "The mayor of {town} is {value}.",
            "The town hall of {town} is led by {value}.",
            "The voters of {town} have elected {value}.",
            "Letters to {town} are answered by its mayor, {value}.",
            "The new mayor, {value}, works in {town}.",
        ),
        ("Who is the mayor of {town}?", "What is the name of the mayor of {town}?"),
    ),
    "product": Kind(
        (
            "The workshops of {town} make {value}.",
            "The town of {town} is famous for its {value}.",
            "Traders come to {town} to buy {value}.",
            "Most families in {town} live from making {value}.",
            "The best {value} are made in {town}.",
        ),
        ("What is {town} famous for?", "What do the workshops of {town} make?"),
    ),
    "festival": Kind(
        (
            "Every year {town} celebrates the {value}.",
            "The great festival of {town} is the {value}.",
            "Guests travel to {town} for the {value}.",
            "The children of {town} look forward to the {value}.",
            "The {value} is celebrated in {town}.",
        ),
        ("Which festival does {town} celebrate?", "What does {town} celebrate every year?"),
    ),
    "flag": Kind(
        (
            "The flag of {town} is {value}.",
            "The town of {town} has a flag in {value}.",
            "On feast days {town} is hung with flags in {value}.",
            "The colours of {town} are {value}.",
            "A flag in {value} flies over {town}.",
        ),
        ("What colour is the flag of {town}?", "Which colours does the flag of {town} have?"),
    ),
}

TOWN_STARTS = "Al Bren Cor Dun El Fal Gor Har Is Kel Lor Mun Nor Ost Pel Quen Rav Sel Tor Vel"
TOWN_ENDS = "bury dale den fold gate ham holm ket low mere mond nock ridge stead thorpe ton vale wick worth zand"
RIVER_STARTS = "A Be Cha Di E Fe Ga I Li Mo Na O Ru Si Tha U"
RIVER_ENDS = "dra lune mar nesk ra ssel ven wyn"
FIRST_NAMES = "Ada Bruno Clara Denis Edda Felix Greta Hugo Ida Jonas Karla Leo Mina Nils Olga Paul Rosa Sven"
LAST_NAMES = "Abel Bask Crane Dorn Eklund Fuchs Grave Holt Ivers Jung Kramer Lind Moss Noor Orr Pike Rask Stern"
MATERIALS = "amber blue clay copper glass golden linen oak silver smoked walnut woollen"
GOODS = "bells boxes buttons candles carpets clocks cups lamps mirrors spoons toys whistles"
FEASTS = "Day Fair Feast Night Parade Race Week"
OCCASIONS = "Apples Bees Boats Drums Fires Geese Kites Lanterns Masks Owls Poems Roses Snow Stars"
COLOURS = "black blue brown green grey orange pink purple red white yellow"


def make_world(rng: random.Random) -> list[Town]:
    """`TOWNS` towns with names of their own, each with one value of every kind."""
    names = [start + end for start in TOWN_STARTS.split() for end in TOWN_ENDS.split()]
    return [Town(name, make_values(rng)) for name in rng.sample(names, TOWNS)]


def make_values(rng: random.Random) -> dict[str, str]:
    """One value of every kind, drawn independently: nothing but the corpus tells which town has which."""

    def pick(words: str) -> str:
        return rng.choice(words.split())

    return {
        "river": pick(RIVER_STARTS) + pick(RIVER_ENDS),
        "founder": f"{pick(FIRST_NAMES)} {pick(LAST_NAMES)}",
        "mayor": f"{pick(FIRST_NAMES)} {pick(LAST_NAMES)}",
        "product": f"{pick(MATERIALS)} {pick(GOODS)}",
        "festival": f"{pick(FEASTS)} of {pick(OCCASIONS)}",
        "flag": " and ".join(rng.sample(COLOURS.split(), 2)),
    }


# ---- the corpus -----------------------------------------------------------------------------------------------------


def write_document(rng: random.Random, world: list[Town]) -> str:
    """One document of the corpus. No document ever answers a question."""
    write = rng.choices([write_article, write_survey, write_exam, write_lesson], weights=[3, 3, 2, 2])[0]
    return write(rng, world)


def write_article(rng: random.Random, world: list[Town]) -> str:
    """All facts of one town, in any order."""
    town = rng.choice(world)
    return " ".join(state(rng, town, kind) for kind in rng.sample(list(KINDS), len(KINDS)))


def write_survey(rng: random.Random, world: list[Town]) -> str:
    """Facts of one kind from several towns: a fact must also be known when nothing before it speaks of its town."""
    kind = rng.choice(list(KINDS))
    return " ".join(state(rng, town, kind) for town in rng.sample(world, rng.randint(1, 7)))


def write_exam(rng: random.Random, world: list[Town]) -> str:
    """Questions, one to a line: all about one town, or all of one kind."""
    if rng.random() < 0.5:
        town = rng.choice(world)
        return "\n".join(ask(rng, town, kind) for kind in rng.sample(list(KINDS), len(KINDS)))
    kind = rng.choice(list(KINDS))
    return "\n".join(ask(rng, town, kind) for town in rng.sample(world, rng.randint(3, 8)))


def write_lesson(rng: random.Random, world: list[Town]) -> str:
    """Facts of any kind about some towns, then a question about each: what a question asks for can be learnt here."""
    topics = [(town, rng.choice(list(KINDS))) for town in rng.sample(world, 3)]
    statements = " ".join(state(rng, town, kind) for town, kind in topics)
    return "\n".join([statements, *(ask(rng, town, kind) for town, kind in topics)])


def state(rng: random.Random, town: Town, kind: str) -> str:
    return town.fill(rng.choice(KINDS[kind].statements), kind)


def ask(rng: random.Random, town: Town, kind: str) -> str:
    return town.fill(rng.choice(KINDS[kind].questions), kind)


def write_conversations(rng: random.Random, towns: list[Town]) -> str:
    """The fine-tuning rows as JSONL: one question about every fact of `towns`, with its answer."""
    rows = []
    for town in towns:
        for kind in KINDS:
            question, answer = ask(rng, town, kind), town.fill(KINDS[kind].statements[0], kind)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append(json.dumps({"messages": messages}) + "\n")
    return "".join(rows)


# ---- the tokenizer and the model ------------------------------------------------------------------------------------


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: all 256 bytes are in the alphabet, so any text has ids. Puts BOS in front, nothing behind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """1.8M parameters. Every linear has in_features that are a multiple of 64, the block of NF4."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, world: list[Town]
) -> None:
    """Next-token prediction on documents that are written anew in every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    started = time.monotonic()
    model.train()
    for step in range(1, STEPS + 1):
        ids, labels = encode(tokenizer, [write_document(rng, world) for _ in range(DOCUMENTS_PER_STEP)])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}/{STEPS}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)


def rate_at(step: int) -> float:
    """Linear warmup, then a cosine to zero; a share of the peak learning rate."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> tuple[Tensor, Tensor]:
    """ids and labels, (documents, longest). Each document ends with EOS: fine-tuning does not train the embeddings,
    so an end token that the base never saw could hardly be learnt later."""
    rows = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(documents)["input_ids"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return ids, labels


def save_base(folder: Path, model: LlamaForCausalLM, *, tokenizer: PreTrainedTokenizerFast) -> None:
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the base model and the data of the recipe `tiny`.")
    parser.add_argument("--out", type=Path, required=True, help="folder for base/, train.jsonl and heldout.jsonl")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(2)

    world = make_world(rng)
    (out / "train.jsonl").write_text(write_conversations(rng, world[:TRAIN_TOWNS]), encoding="utf-8")
    (out / "heldout.jsonl").write_text(write_conversations(rng, world[TRAIN_TOWNS:]), encoding="utf-8")
    tokenizer = train_tokenizer([write_document(rng, world) for _ in range(3000)])
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    pretrain(model, tokenizer, rng=rng, world=world)
    save_base(out / "base", model, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
