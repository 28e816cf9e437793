"""Replay golden vectors through the project and say, case by case, whether our numbers are the reference's.

    python scripts/verify.py tests/golden
    python scripts/verify.py tests/golden --device cuda --dtype bfloat16 --attention_backend cudnn

The folder holds pairs of .json and .safetensors, and manifests (.json alone). Exit status 1 if any case fails.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import math
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from arl2.evaluation.golden.run import verify_folder
from arl2.evaluation.golden.vectors import CaseResult, Precision
from pipelines.cli import choose_device, entry_point
from pipelines.dtypes import DTYPES
from pipelines.flags import Parser, as_path
from pipelines.provenance import device_name
from wan.ops.attention import AttentionBackend, require_backend
from wan.utils.files import check_target, write_json

VERIFY_DTYPES = DTYPES | {"float64": torch.float64}


def line(result: CaseResult) -> str:
    """One case: the verdict, the largest errors, the tolerance of the tensor that comes nearest to it."""
    if result.failure is not None:
        return f"FAIL  {result.file} {result.case}: {result.failure}"
    verdict = "ok  " if result.passed else "FAIL"
    text = f"{verdict}  {result.file} {result.case}: {result.compared} compared"
    if result.tolerance is None:
        return text
    return (
        f"{text}, largest relative error {result.rms_rel:.1e} (tolerance {result.tolerance.rms_rel:.1e}), "
        f"absolute {result.max_abs:.1e} (tolerance {result.tolerance.max_abs:.1e}); "
        f"{100 * result.used:.1f} % used by {result.worst}"
    )


def row(result: CaseResult) -> dict[str, Any]:
    """A result as JSON takes it, which knows no infinity."""
    fields = asdict(result) | {"passed": result.passed}
    for holder in (fields, fields["tolerance"] or {}):
        holder.update({key: None for key, value in holder.items() if value == math.inf})
    return fields


@entry_point()
def main() -> int:
    """Parse, replay, report."""
    parser = Parser(__doc__, aliases={"--backend": "--attention_backend"})
    parser.add_argument("folder", type=as_path, help="folder of golden files")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda or cuda:N")
    parser.add_argument("--dtype", choices=VERIFY_DTYPES, default="float32", help="of the weights (default float32)")
    backends = f"{', '.join(AttentionBackend)} (default auto)"
    parser.add_argument("--attention_backend", default="auto", metavar="NAME", help=backends)
    parser.add_argument("--json", type=as_path, metavar="PATH", help="also write the results here")
    arguments = parser.parse_args()
    device, dtype = choose_device(arguments.device), VERIFY_DTYPES[arguments.dtype]
    if arguments.json:
        check_target(arguments.json)
    # TF32 keeps 10 bits of mantissa: float32 must mean float32 here.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    precision = Precision(device, dtype, require_backend(arguments.attention_backend, device, dtype))
    console, results = Console(soft_wrap=True, highlight=False), []
    for result in verify_folder(arguments.folder, precision):
        console.print(line(result), style=None if result.passed else "red", markup=False)
        results.append(result)
    failed = sum(not result.passed for result in results)
    name = device_name(device)
    console.print(
        f"{len(results) - failed} of {len(results)} cases passed on {device} ({name}), {arguments.dtype}, "
        f"backend {precision.backend}, torch {torch.__version__}"
    )
    if arguments.json:
        rows = [row(result) for result in results]
        write_json(arguments.json, {"device": name, "torch": torch.__version__, "results": rows})
        console.print(f"the results are in {arguments.json}", markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
