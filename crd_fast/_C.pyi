def noise(
    x0_ptr: int,
    x0_dtype: int,
    x0_row_stride: int,
    out_ptr: int,
    out_dtype: int,
    out_row_stride: int,
    sigma_ptr: int,
    sample_ids_ptr: int,
    batch: int,
    dim: int,
    seed: int,
    stream: int,
    threads: int,
) -> None: ...
def epsilon(
    out_ptr: int,
    out_dtype: int,
    out_row_stride: int,
    sample_ids_ptr: int,
    batch: int,
    dim: int,
    seed: int,
    stream: int,
    threads: int,
) -> None: ...
def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]: ...
def instruction_set() -> str: ...
