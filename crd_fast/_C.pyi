# address, dtype code, elements between rows, sizes and strides of a row's axes
_Rows = tuple[int, int, int, list[int], list[int]]

def noise(
    x0: _Rows | None,
    out: _Rows,
    sigma: int,
    sample_ids: int,
    batch: int,
    dim: int,
    seed: int,
    stream: int,
    threads: int,
) -> None: ...
def residual_sums(
    predicted: _Rows,
    target_kind: int,
    target: _Rows | None,
    sample_ids: int,
    seed: int,
    stream: int,
    ref: _Rows | None,
    ref_uncond: _Rows | None,
    guidance_scale: float,
    mask: _Rows | None,
    batch: int,
    dim: int,
    sums: int,
    threads: int,
) -> None: ...
def residual_grad(
    predicted: _Rows,
    target_kind: int,
    target: _Rows | None,
    sample_ids: int,
    seed: int,
    stream: int,
    ref: _Rows | None,
    ref_uncond: _Rows | None,
    guidance_scale: float,
    mask: _Rows | None,
    batch: int,
    dim: int,
    error_weight: int,
    gap_weight: int,
    grad: _Rows,
    threads: int,
) -> None: ...
def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]: ...
def instruction_set() -> str: ...
