# docker build -t moesparse .
# docker run --rm -v "$PWD/out:/work/out" moesparse prune demo out/dense --weights 2:4 --saliency gated-sparsegpt
# docker run --rm -v "$PWD/out:/work/out" -p 8000:8000 moesparse serve out/dense --host 0.0.0.0 --api-key KEY
FROM python:3.12-slim

# the compiler is for the kernels of the CPU, and libgomp for running them
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN pip install --no-cache-dir "/src[serve,eval,plots]" && rm -rf /src

WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["moesparse"]
CMD ["--help"]
