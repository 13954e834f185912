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

Strided = tuple[int, int, int, int]

def has_token_kernels(isa: int) -> bool: ...
def gram_add(
    isa: int, threads: int, x: int, tokens: int, width: int, packed: int, sum: int
) -> None: ...
def attention_scratch(isa: int, tokens: int, head_size: int) -> int: ...
def causal_attention(
    isa: int,
    threads: int,
    q: Strided,
    k: Strided,
    v: Strided,
    out: Strided,
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    head_size: int,
    scale: float,
    scratch: int,
) -> None: ...
