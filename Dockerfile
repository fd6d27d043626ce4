# syntax=docker/dockerfile:1
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY outbox ./outbox
COPY cli ./cli
COPY migrations ./migrations
RUN pip wheel --no-cache-dir --wheel-dir /wheels '.[relay]'

FROM python:3.13-slim
RUN useradd --system --create-home --uid 10001 outbox
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels 'outbox-publisher[relay]'
USER outbox
WORKDIR /home/outbox
ENV OUTBOX_LOG_FORMAT=json
# SIGTERM: the relay finishes or aborts its batch and exits 0.
STOPSIGNAL SIGTERM
ENTRYPOINT ["outbox"]
CMD ["relay"]
