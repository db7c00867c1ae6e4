# One image with and without a GPU; its base brings torch, so that nothing of several gigabytes is installed twice.
#   docker build -t tracknet .
#   docker run --rm --gpus all -v "$PWD:/work" tracknet predict --run embedded/vit_tiny_heatmap rally.mp4 --out out
# Without a GPU, leave out --gpus all.
ARG BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime
FROM ${BASE}
COPY . /opt/tracknet
RUN pip install --no-cache-dir /opt/tracknet && rm -rf /opt/tracknet
RUN useradd --create-home runner
USER runner
WORKDIR /work
ENTRYPOINT ["tracknet"]
CMD ["--help"]
