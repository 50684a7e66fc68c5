#!/usr/bin/env bash
# Whatever the server's own description allows or forbids, sent to it: schemathesis makes the requests from /openapi.json, and
# looks for faults of the server (5xx), answers that are not as described, and answers that do not come.
#
#     tests/sdk/openapi.sh [SECONDS]     # 300 where nothing is said; needs python3 with pip, and cargo
#
# The engine is the null one, so what is tested is the server, not the model. The tool has an environment of its own, under
# target/, and speaks to nobody but a server of its own on loopback.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds="${1:-300}"
version=4.32.5

tools="$PWD/target/schemathesis-$version"
if ! [ -x "$tools/bin/st" ]; then
  python3 -m venv --clear "$tools"
  "$tools/bin/pip" install --quiet "schemathesis==$version"
fi
valar="${VALAR:-target/debug/valar}"
[ -n "${VALAR:-}" ] || cargo build --quiet --locked

folder="$(mktemp -d)"
"$valar" serve --port 0 --data "$folder/data" --api-key k --engine null --memory 1GiB --model SmolLM2-135M-Instruct 2>"$folder/said" &
server=$!
trap 'kill $server && wait $server || true; rm -rf "$folder"' EXIT
until grep -qs "listening on " "$folder/said"; do kill -0 $server; sleep 0.2; done
url="$(sed -n 's/.*listening on //p' "$folder/said")"

# With the model's name, so that most requests come as far as the engine, and with little to do.
python3 - "$url" >"$folder/openapi.json" <<'PYTHON'
import json, sys, urllib.request

document = json.load(urllib.request.urlopen(sys.argv[1] + "/openapi.json"))
schemas = document["components"]["schemas"]
for schema in schemas.values():
    properties = schema.get("properties", {})
    if schema.get("required", [])[:1] == ["model"]:
        properties["model"] = {"enum": ["SmolLM2-135M-Instruct"]}
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if name in properties:
            properties[name]["maximum"] = 50
schemas["WaitRequest"]["properties"]["timeout_s"]["maximum"] = 1
# Nobody is to be called.
for name in ("WebhookRequest", "WebhookChange"):
    schemas[name]["properties"]["url"] = {"enum": ["https://hooks.invalid/"]}
json.dump(document, sys.stdout)
PYTHON

# Where it leaves what it remembers.
cd "$folder"
"$tools/bin/st" run openapi.json --url "$url" --header "Authorization: Bearer k" --max-time "$seconds" \
  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
  --continue-on-failure --suppress-health-check all --request-timeout 30 --warnings off

# It still serves, and nothing is left at work. Background responses and batches go on by themselves.
metrics="$(python3 - "$url" <<'PYTHON'
import sys, urllib.request

request = urllib.request.Request(sys.argv[1] + "/metrics", headers={"x-api-key": "k"})
print(urllib.request.urlopen(request).read().decode())
PYTHON
)"
grep -E "^valar_http_responses_total" <<<"$metrics"
grep -qE '^valar_http_responses_total\{status="5xx"\} 0$' <<<"$metrics"
