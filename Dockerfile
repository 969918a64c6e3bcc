# docker build -t softpref .                             torch for CPUs
# docker build -t softpref --build-arg TORCH=cu128 .     torch for a CUDA version, as uv names it
# docker run --rm -v "$PWD:/data" softpref audit --model MODEL --data pairs.jsonl --clean 150 --output audit
FROM python:3.13-slim AS wheel
WORKDIR /source
RUN pip install --no-cache-dir build
COPY pyproject.toml README.md LICENSE CHANGELOG.md CITATION.cff SECURITY.md ./
COPY src src
RUN python -m build --wheel --outdir /dist

FROM python:3.13-slim
ARG TORCH=cpu
RUN pip install --no-cache-dir uv
COPY constraints.txt /constraints.txt
COPY --from=wheel /dist /dist
RUN uv pip install --system --no-cache --torch-backend "$TORCH" --constraint /constraints.txt \
        "$(echo /dist/*.whl)[sft,judge]" \
    && useradd --create-home softpref
ENV HF_HUB_DISABLE_TELEMETRY=1
USER softpref
WORKDIR /data
ENTRYPOINT ["softpref"]
CMD ["--help"]
