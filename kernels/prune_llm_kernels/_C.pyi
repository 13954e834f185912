# Pointers are integers; 0 stands for an absent tensor.

def isa_names() -> list[str]: ...
def thread_pool_name() -> str: ...
def check(
    bitmask: int,
    offsets: int,
    offset_bytes: int,
    out_features: int,
    in_features: int,
    nnz: int,
) -> tuple[str, int, int, int]: ...
def linear(
    isa: int,
    dtype: int,
    threads: int,
    x: int,
    batch: int,
    bitmask: int,
    values: int,
    offsets: int,
    offset_bytes: int,
    out_features: int,
    in_features: int,
    nnz: int,
    bias: int,
    y: int,
) -> None: ...
def unpack(
    isa: int,
    dtype: int,
    threads: int,
    bitmask: int,
    values: int,
    offsets: int,
    offset_bytes: int,
    out_features: int,
    in_features: int,
    nnz: int,
    out: int,
    begin: int,
    end: int,
) -> None: ...
def read_all(data: int, bytes: int, threads: int) -> int: ...
def use_huge_pages(data: int, bytes: int) -> None: ...
