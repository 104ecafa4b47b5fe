#!/usr/bin/env bash
# Tests and benchmarks on a GPU: `bash benchmarks/gpu.sh`, at most 8 minutes on an H100 or H200, without a network.
#
# It needs Python 3.12 with torch 2.11 and torchvision 0.26 for CUDA, and g++ for Triton. On a machine that has these
# and the usual packages of deep learning, such as h5py, matplotlib, pytest and hypothesis, but none of DVC and spaCy,
# bring the others as an archive. Make it on a machine with pip, in the root of the repository:
#
#   python -m pip install --quiet --no-deps --no-compile --only-binary=:all: --target .gpu/site --python-version 3.12 \
#     --constraint constraints.txt \
#     --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
#     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 $(sed -n 's/^#   wheels: //p' benchmarks/gpu.sh)
#   tar -C .gpu/site --exclude tests -cJf .gpu/site.tar.xz . && rm -r .gpu/site
#
# and copy .gpu/site.tar.xz with the repository. Without it, the script needs pydantic and ruamel.yaml, and skips the
# whole pipeline if DVC is missing. METEOR and SPICE are left out, which need Java.
#
#   wheels: aiohttp-retry amqp annotated-types appdirs asyncssh atpublic billiard blis
#   wheels: catalogue celery cffi click-didyoumean click-plugins click-repl cloudpathlib confection configobj
#   wheels: cryptography cymem dictdiffer diskcache distro dpath dulwich dvc dvc-data dvc-http dvc-objects dvc-render
#   wheels: dvc-studio-client dvc-task entrypoints flatten-dict flufl.lock funcy gitdb gitpython grandalf gto
#   wheels: iterative-telemetry kombu murmurhash orjson platformdirs preshed prompt-toolkit
#   wheels: pycocotools pycparser pydantic pydantic-core pydantic-settings pydot pygit2 pygtrie python-dotenv
#   wheels: ruamel.yaml scmrepo semver shortuuid shtab smart-open smmap spacy spacy-legacy spacy-loggers sqltrie srsly
#   wheels: thinc tomlkit typing-inspection tzlocal vine voluptuous wasabi wcwidth weasel zc.lockfile
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -f .gpu/site.tar.xz ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  tar -C "$site" -xJf .gpu/site.tar.xz
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0
timeout 200 python3 -m pytest -q -m gpu -p no:cacheprovider $(grep -l mark.gpu tests/test_*.py) || status=$?
timeout $((480 - SECONDS)) python3 -m benchmarks.gpu "$@" || status=$?
exit "$status"
