"""A real ``llama-mtmd-cli`` on the same files: a process that is timed, and whose own timings are read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from localvlm.answers import VlmFiles
from localvlm.bench.cases import STAGES, Run
from localvlm.bench.start import Process
from localvlm.engine.api import LoadOptions, VlmInfo
from localvlm.errors import ModelError, UsageError

__all__ = ["Peer", "run_of"]

_ENCODED = re.compile(r"(?:slice encoded|batch encoding done) in (\d+) ms")
_TILES = re.compile(r"encoding mtmd batch, n_chunks = (\d+)")
_PROMPT = re.compile(r"prompt eval time =\s*([\d.]+) ms /\s*(\d+) tokens")
_EVAL = re.compile(r"(?<!prompt )\beval time =\s*([\d.]+) ms /\s*(\d+) runs")


class Peer:
    """``llama-mtmd-cli`` as it answers a question about a picture.

    Args:
        program: its file.
        picture: a file.
        model: what was told of the large model when it was loaded.

    Raises:
        UsageError: there is no such program.
    """

    def __init__(
        self, program: Path, files: VlmFiles, picture: Path, question: str, answer: int, options: LoadOptions,
        model: VlmInfo,
    ) -> None:  # fmt: skip
        if not os.access(program, os.X_OK) or program.is_dir():
            raise UsageError(f"'{program}' is not a program", "pass --peer with the path of a llama-mtmd-cli")
        self._command = [
            str(program), "-m", str(files.model), "--mmproj", str(files.mmproj), "--image", str(picture),
            "-p", question, "-n", str(answer), "--temp", "0", "--ignore-eos", "-c", str(model.n_ctx),
            "-ngl", str(options.gpu_layers if options.gpu_layers >= 0 else 999), "--perf", "-lv", "4",
        ]  # fmt: skip
        if options.threads:
            self._command += ["-t", str(options.threads)]
        if options.gpu_layers == 0:
            self._command += ["--no-mmproj-offload", "--device", "none"]  # else it lends a GPU large batches
        if model.chat_template is None:
            self._command += ["--chat-template", "vicuna" if model.family.startswith("llava") else "chatml"]

    def run(self) -> tuple[Run, Process]:
        """What it says of itself, and the process.

        Raises:
            ModelError: it failed, or says nothing of its time.
        """
        with tempfile.TemporaryFile() as log:
            started = time.perf_counter()
            process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            peak = _wait(process)
            seconds = time.perf_counter() - started
            log.seek(0)
            text = log.read().decode("utf-8", "replace")
        if process.returncode:
            last = text.strip().splitlines()[-1:] or ["nothing"]
            raise ModelError(f"'{self._command[0]}' left with code {process.returncode} and said: {last[0][:300]}")
        return run_of(text, peak), Process(None, seconds, peak)


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Waits for its end; the most bytes that it held, where the system tells."""
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def run_of(text: str, peak: int | None = None) -> Run:
    """The timings in what it wrote. Those of the prompt include the picture's rows.

    Raises:
        ModelError: some are missing.
    """
    prompt, answer = _PROMPT.search(text), _EVAL.search(text)
    if prompt is None or answer is None:
        raise ModelError("the peer's output has no timings", "pass a llama-mtmd-cli with --peer")
    ms = dict.fromkeys(STAGES, 0.0)
    encoded = _ENCODED.findall(text)
    tiles = sum(map(int, _TILES.findall(text))) or len(encoded)
    ms |= {"encode": float(sum(map(int, encoded))), "prefill": float(prompt[1]), "decode": float(answer[1])}
    rows = int(prompt[2])
    first = ms["encode"] + ms["prefill"]
    return Run(
        ms, first, first + ms["decode"], image=0, kept=None, prompt=rows, generated=int(answer[2]) + 1,
        tiles=tiles, encoded=tiles, peak=peak,
    )  # fmt: skip
