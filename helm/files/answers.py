"""What `helm test` runs, in the image: waits until each model answers a chat through the Service, and prints what it said.

    answers.py URL TIMEOUT_S MODEL...

A key is taken from the tenants file that $QUIRE_TENANTS_FILE names: YAML with `tenants`, or a key on each line.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml

PAUSE_S = 2.0
NOT_YET = {404, 408, 429, 500, 502, 503, 504}  # 404: Serve has no application yet


def api_key() -> str | None:
    """The first key of the file; None when no file is named."""
    path = os.environ.get("QUIRE_TENANTS_FILE")
    if path is None:
        return None
    text = Path(path).read_text(encoding="utf-8")
    told = yaml.safe_load(text)
    return told["tenants"][0]["keys"][0] if isinstance(told, dict) else text.split()[0]


def ask(url: str, model: str, key: str | None) -> str:
    """What a model says."""
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def main(url: str, timeout_s: float, models: list[str]) -> int:
    deadline_s = time.monotonic() + timeout_s
    key = api_key()
    for model in models:
        while True:
            try:
                print(f"{model}: {ask(url, model, key)!r}", flush=True)
                break
            except urllib.error.HTTPError as error:
                why, hopeless = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}", error.code not in NOT_YET
            except OSError as error:
                why, hopeless = str(error), False
            if hopeless or time.monotonic() > deadline_s:
                print(f"{model}: {why}", file=sys.stderr)
                return 1
            time.sleep(PAUSE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
