#!/bin/sh
# vLLM takes the key that it asks for from its environment, or from the command line, which everybody can read.
key=/run/secrets/everloop_engine_key
[ ! -r "$key" ] || { VLLM_API_KEY=$(cat "$key") && export VLLM_API_KEY; }
exec python -m vllm.entrypoints.openai.api_server "$@"
