# lorasft with CUDA's runtime, for a user without rights:
#   docker build -t lorasft .
#   docker run --rm -it --gpus all -v "$PWD:/data" -v lorasft-cache:/cache lorasft train tiny
# Not built so far (docs/sharing.md); tests/test_site.py reads it.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lorasft ./lorasft
COPY recipes ./recipes
RUN python3 -m venv /opt/lorasft \
    && /opt/lorasft/bin/pip install --no-cache-dir -c constraints.txt ".[gguf]" \
    && rm -rf /src/*
# What is downloaded and kept goes where a volume can be; whoever runs it may write there, also by --user.
RUN useradd --create-home --uid 10001 lorasft \
    && mkdir -p /cache /data \
    && chown lorasft /data \
    && chmod 1777 /cache
ENV PATH=/opt/lorasft/bin:$PATH HF_HOME=/cache/huggingface LORASFT_CACHE=/cache/lorasft PYTHONUNBUFFERED=1
VOLUME /cache
USER lorasft
WORKDIR /data
ENTRYPOINT ["lorasft"]
CMD ["--help"]
