"""A tiny random model with a byte-level tokenizer, and `quire serve` as a subprocess around it."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from quire.deploy.process_tree import Process, descendants, is_alive

READY_TIMEOUT_S = 240.0
END_TIMEOUT_S = 120.0


def save_tiny_model(path: Path, max_model_len: int = 8192, seed: int = 0) -> None:
    """A Llama of 40,000 weights, and a tokenizer with one token for each byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_model_len,
        eos_token_id=256,
        bos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def until(what: str, true: Callable[[], Any], told: Callable[[], Any], within_s: float = 240.0) -> Any:
    """The first true answer; fails with what is `told` when there is none in time."""
    deadline_s = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < deadline_s, f"it never came to this: {what}\n{told()}"
        time.sleep(0.1)
    return found


class Serve:
    """`quire serve` in a session (and so a process group) of its own."""

    def __init__(self, log: Path, *flags: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "quire.deploy.cli", "serve", "--port", "0", "--admin-port", "0", *flags]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True, cwd=log.parent, env=dict(os.environ)
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = ""
        self.below: list[Process] = []

    def _read(self) -> None:
        if (stdout := self.process.stdout) is not None:
            with stdout:
                for line in stdout:
                    self._lines.put(line)
        self._lines.put("")

    def wait_ready(self) -> None:
        """Returns when the ready line, and nothing else, has come; then `url` and `below` (its processes) are known."""
        line = self._lines.get(timeout=READY_TIMEOUT_S)
        prefix = "Quire is ready on http://127.0.0.1:"
        assert line.startswith(prefix), f"stdout said {line!r}; stderr:\n{self.stderr()}"
        assert line.removeprefix(prefix).strip().isdigit()
        self.url = line.split()[-1]
        self.look_below()

    def look_below(self) -> None:
        """`below` is what is there now."""
        self.below = descendants(self.process.pid)

    def brought(self) -> list[Process]:
        """Its processes that were not there when `below` was taken."""
        return [p for p in descendants(self.process.pid) if p not in self.below]

    @property
    def admin(self) -> str:
        """The address of its admin API."""
        found = re.search(r"admin API on (http://[\w.:]+)", self.stderr())
        assert found is not None, self.stderr()
        return found[1]

    def status(self) -> dict[str, Any]:
        """What the admin API says; asked again while the controller is away."""
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while True:
            answer = httpx.get(self.admin + "/admin/status", timeout=END_TIMEOUT_S)
            if answer.status_code == 200:
                found: dict[str, Any] = answer.json()
                return found
            assert time.monotonic() < deadline_s, answer.text
            time.sleep(0.05)

    def stderr(self) -> str:
        return self._log.read_text()

    def signal(self, number: int) -> None:
        """To the command alone."""
        self.process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """To its whole process group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        """The exit code; stdout held one line at most."""
        code = self.process.wait(END_TIMEOUT_S)
        rest = self._lines.get(timeout=END_TIMEOUT_S)
        assert rest == "", f"stdout said {rest!r}"
        return code

    def left_behind(self, within_s: float = 0.0) -> list[str]:
        """Command lines of its processes that are still there after `within_s`."""
        deadline_s = time.monotonic() + within_s
        while (alive := [p for p in self.below if is_alive(p)]) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return [_command(p.pid) for p in alive]

    def pid_of(self, title: str) -> int:
        """The process below it whose command line begins with `title`."""
        return next(p.pid for p in self.below if _command(p.pid).startswith(title))

    def argument(self, name: str) -> str:
        """The value of `--name=value` on the command line of one of its processes."""
        words = (word for p in self.below for word in _command(p.pid).split("\0"))
        return next(word.removeprefix(f"--{name}=") for word in words if word.startswith(f"--{name}="))

    def __enter__(self) -> Serve:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.below = self.below or descendants(self.process.pid)
            self.process.kill()
            self.process.wait(END_TIMEOUT_S)
        for process in self.below:
            if is_alive(process):
                os.kill(process.pid, signal.SIGKILL)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
