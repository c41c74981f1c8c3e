"""The command line: one run (Hydra overrides) or a verb; errors become sentences and exit codes.

The last line of stdout is one JSON document; everything else goes to stderr.
"""

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from orcd_batch.errors import OrcdError

HELP = """\
orcd-batch: batch LLM inference that can be trusted to the bit

Run a job (Hydra overrides; `python -m orcd_batch` is the same program):
  orcd-batch model=smollm2 data=prompts.parquet
  orcd-batch model=phi3 model.path=FILE.gguf data=prompts.parquet output=out.parquet
  orcd-batch -m model=smollm2 data=prompts.parquet \\
      sampling.temperature=0,0.7,1.0 'sampling.seed=range(10)'

Whole jobs (docs/nightly.md; their files are in jobs/):
  orcd-batch --config-dir jobs --config-name nightly_reproducibility model=phi3 data=prompts.parquet

Other verbs:
  orcd-batch verify A B                 compare two outputs, bit for bit
  orcd-batch verify RUN DIRECTORY [--update --reason "…"]
                                        compare with golden results, or replace them
  orcd-batch report RUN... [-o DIRECTORY] [--no-files]
                                        tables and an HTML page; a sweep's rows in one file
  orcd-batch inspect FILE.gguf [OTHER.gguf] [--markdown]
                                        what a model file holds, and whether it can run
Options:
  model=phi3|qwen2_5|llama2|llama3|smollm2
  model.path=FILE.gguf or hf://owner/repo/file.gguf@revision
  model.chat=true|false                 wrap a string prompt as one user message
  model.chat_date=YYYY-MM-DD            the date that chat templates see
  model.sliding_window=N                null: as the file says; 0: off
  data=FILE_OR_DIR_OR_GLOB              Parquet in
  output=FILE.parquet                   default outputs/<job id>/completions.parquet
  overwrite=true                        start afresh over a different or finished job
  sampling=greedy|default
  sampling.temperature/top_k/top_p/min_p/repetition_penalty/seed/max_tokens/stop/n/ignore_eos
  dataset.prompt_column/messages_column/token_ids_column/id_column/sampling_columns/
          drop_columns/output_prefix/limit/on_error=record|raise
  engine=auto|cuda|numpy
  engine.max_num_seqs/max_num_batched_tokens/max_model_len/gpu_memory_utilization/
         kv_cache_bytes/prefix_caching/num_threads/graphs
  scale_out=none|ray                    one job over many GPUs or nodes (docs/scale_out.md)
  scale_out.address/replicas/gpus_per_replica/cpus_per_replica/retries/start_timeout_s
  check.directory/history/baseline/junit/report/runs/batch_sizes/chunk_sizes/orders/single_rows/
        stop_after/kill_after/thread_counts/prefix_caching/graphs/gpus/replicas/timeout_s
                                        with the jobs nightly_reproducibility and acceptance
  debug=true                            tracebacks; time per op in the log and the manifest

The same command after an interruption continues where it stopped.
Quote what Hydra's grammar would take apart: 'data="my (1) file.parquet"',
'sampling.stop=["<|end|>","a, b"]'; a newline is typed as one: $'sampling.stop=["\\n"]'.
`--cfg job` shows the composed config. Apart from which engine it is, the engine's options change
speed, never a bit of the result; engine.max_model_len alone also says where a completion must end.
Exit codes: 0 done; 1 differences found, or rows failed under dataset.on_error=raise;
2 bad input or config; 130 interrupted, resumable.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; argparse alone may exit by itself."""
    args = list(sys.argv[1:] if argv is None else argv)
    verb = VERBS.get(args[0]) if args else None
    if not args or args[0] == "help" or (verb is None and {"-h", "--help"}.intersection(args)):
        print(HELP, end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        from orcd_batch import __version__

        print(f"orcd-batch {__version__}")
        return 0
    debug = "debug=true" in [a.lower().replace(" ", "") for a in args] or "--debug" in args
    if verb is None:
        return _guarded(lambda: _run(args), debug)
    return _guarded(lambda: verb(args[1:]), debug)


def _guarded(command: Callable[[], tuple[Any, int]], debug: bool) -> int:
    """Prints the command's JSON as the last line of stdout, or its error as one sentence."""
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            document, code = command()
    except OrcdError as error:
        if debug:
            traceback.print_exc()
        print(f"orcd-batch: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("orcd-batch: interrupted; the same command continues.", file=sys.stderr)
        return 130
    return code if document is None else _print_document(document, code, stdout)


def _print_document(document: Any, code: int, stdout: TextIO) -> int:
    try:
        print(json.dumps(document, allow_nan=False), file=stdout, flush=True)
    except BrokenPipeError:  # the reader went away; the work is done all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    except OSError as error:
        print(f"orcd-batch: the result cannot be printed: {error}.", file=sys.stderr)
        return 2
    return code


def _run(args: list[str]) -> tuple[Any, int]:
    from orcd_batch.warm_up import gpu_warm_up

    with gpu_warm_up(args):
        from orcd_batch.hydra_app.app import run

        return run(args)


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"orcd-batch {verb}", description=description)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _verify(args: Sequence[str]) -> tuple[Any, int]:
    parser = _parser("verify", "Compare two outputs row by row; exit 1 when they differ.")
    parser.add_argument("a", help="an output file, a run directory or a sweep directory")
    parser.add_argument("b", help="the other one, or a directory of golden results")
    parser.add_argument("--update", action="store_true", help="make A the golden result in B")
    parser.add_argument("--reason", help="why a golden result is replaced; kept with it")
    options = parser.parse_args(args)
    from rich.console import Console

    from orcd_batch.reproducibility.baseline_verify import verify

    document, text, code = verify(options.a, options.b, options.update, options.reason)
    Console(stderr=True).print(text)
    return document, code


def _report(args: Sequence[str]) -> tuple[Any, int]:
    parser = _parser("report", "Tables and a page over finished runs; a sweep's rows in one file.")
    parser.add_argument(
        "runs", nargs="+", help="output files, run directories or sweep directories"
    )
    parser.add_argument("-o", "--output", help="directory of the page; default: beside the run")
    parser.add_argument("--no-files", action="store_true", help="tables only: write nothing")
    options = parser.parse_args(args)
    from rich.console import Console

    from orcd_batch.reproducibility.report import as_dict, render, report
    from orcd_batch.reproducibility.report_html import write_report

    result = report(options.runs)
    Console(stderr=True).print(render(result))
    files = {} if options.no_files else write_report(result, options.runs, options.output)
    for name in ("combined", "page"):
        if name in files:
            print(f"{name}: {files[name]}", file=sys.stderr)
    return {**files, **as_dict(result)}, 0


def _inspect(args: Sequence[str]) -> tuple[Any, int]:
    parser = _parser("inspect", "What a GGUF file holds, and whether this program can run it.")
    parser.add_argument("file", help="a .gguf file, or hf://owner/repo/file.gguf@revision")
    parser.add_argument("other", nargs="?", help="a second file: show what differs")
    parser.add_argument("--markdown", action="store_true", help="a report in Markdown on stdout")
    options = parser.parse_args(args)
    from orcd_batch.checkpoint import hub, inspection, inspection_report
    from orcd_batch.text import Tokenizer

    other = hub.resolve_model_path(options.other) if options.other else None
    path = hub.resolve_model_path(options.file)
    checks = [lambda gguf: Tokenizer.from_metadata(gguf.metadata)]
    found = inspection.inspect_file(path, other, checks)
    if options.markdown:
        print(inspection_report.render_markdown(found), file=sys.__stdout__)
    else:
        from rich.console import Console

        Console(stderr=True).print(inspection_report.render_terminal(found))
    return inspection_report.as_json(found), 0


VERBS: dict[str, Callable[[Sequence[str]], tuple[Any, int]]] = {
    "verify": _verify,
    "report": _report,
    "inspect": _inspect,
}
