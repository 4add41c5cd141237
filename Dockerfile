# Two images of one source: `gateway` holds no torch; `trainer` adds what learning and the model server need.
#   docker build --target gateway -t plaudit-gateway .
#   docker build --target trainer -t plaudit .
# The lock pins every package; --no-deps because one of them asks for a torch build that the index does not have.

FROM python:3.11-slim-bookworm AS source
WORKDIR /plaudit
COPY pyproject.toml README.md requirements.lock plaudit.py ./
COPY commands commands
COPY feedback feedback
COPY deploy deploy
COPY serving serving
COPY trainer trainer
COPY examples examples

FROM source AS gateway
# From the lock the core's packages only, each at the lock's version: the lock constrains, pyproject.toml says what is needed.
RUN pip install --no-cache-dir --constraint requirements.lock ".[kafka,postgres]" \
    && useradd --system --uid 10001 --home-dir /plaudit plaudit \
    && install --directory --owner=plaudit /plaudit/data
USER 10001
VOLUME /plaudit/data
EXPOSE 8000
ENV PLAUDIT__SERVER__HOST=0.0.0.0 PLAUDIT__FEEDBACK__DATA_DIR=/plaudit/data
HEALTHCHECK --interval=10s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=5)"]
# Beside an existing model server: PLAUDIT__ENGINE__URL says where it is.
ENTRYPOINT ["plaudit"]
CMD ["up"]

FROM source AS trainer
# numactl's and OpenMP's libraries are what the model server's CPU build links to.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1=12.* libnuma1=2.* \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir --no-deps --requirement requirements.lock \
    && pip install --no-cache-dir --no-deps . \
    && useradd --system --uid 10001 --home-dir /plaudit plaudit \
    && install --directory --owner=plaudit /plaudit/data
USER 10001
VOLUME /plaudit/data
ENV PLAUDIT__SERVER__HOST=0.0.0.0 PLAUDIT__FEEDBACK__DATA_DIR=/plaudit/data
ENTRYPOINT ["plaudit"]
CMD ["trainer"]
