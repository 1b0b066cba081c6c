#!/bin/sh
# The engine's door takes the key that it asks for from the environment: a command line everybody can read.
key=/run/secrets/everloop_engine_key
[ ! -r "$key" ] || { EVERLOOP_ENGINE_KEY=$(cat "$key") && export EVERLOOP_ENGINE_KEY; }
exec python -m vllm.entrypoints.openai.api_server "$@"
