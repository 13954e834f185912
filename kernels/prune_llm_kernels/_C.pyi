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
def rms_norm(
    isa: int,
    dtype: int,
    threads: int,
    x: int,
    weight: int,
    y: int,
    rows: int,
    width: int,
    eps: float,
) -> None: ...
def silu_mul(
    isa: int, dtype: int, threads: int, gate: int, up: int, y: int, count: int
) -> None: ...
def rotate(
    isa: int,
    dtype: int,
    threads: int,
    x: int,
    y: int,
    cosine: int,
    sine: int,
    batch: int,
    tokens: int,
    heads: int,
    head_size: int,
    rotary: int,
    pitch: int,
) -> None: ...
def add_squares(
    isa: int, dtype: int, threads: int, x: int, sum: int, tokens: int, width: int
) -> None: ...
def mark_lowest(
    threads: int, scores: int, rows: int, width: int, counts: int, marked: int
) -> None: ...

class Plan:
    def __init__(self, isa: int, dtype: int) -> None: ...
    def linears(
        self,
        x: int,
        batch: int,
        in_features: int,
        weights: list[tuple[int, int, int, int, int, int, int, int]],
        accumulate: bool,
    ) -> None: ...
    def channels(
        self,
        x: int,
        batch: int,
        in_features: int,
        scales: int,
        thresholds: int,
        counts: int,
        weights: list[tuple[int, int, int, int, int, int, int]],
        accumulate: bool,
        gated: bool,
    ) -> None: ...
    def rms_norm(
        self, x: int, weight: int, y: int, batch: int, heads: int, width: int, eps: float
    ) -> None: ...
    def silu_mul(self, gate: int, up: int, y: int, batch: int, width: int) -> None: ...
    def attention(
        self,
        heads: tuple[int, int, int, int],
        angles: tuple[int, int],
        cache: tuple[int, int],
        where: tuple[int, int],
        batch: int,
        head_count: int,
        kv_heads: int,
        head_size: int,
        rotary: int,
        page_size: int,
        cache_pages: int,
        page_count: int,
        window: int,
        scale: float,
    ) -> None: ...
    def run(self, threads: int, rows: int) -> bool: ...

def read_all(data: int, bytes: int, threads: int) -> int: ...
def use_huge_pages(data: int, bytes: int) -> None: ...

Strided = tuple[int, int, int, int]

def has_slow_pairs() -> bool: ...
def has_gram(isa: int) -> bool: ...
def has_attention(isa: int) -> bool: ...
def gram_add(
    isa: int, threads: int, x: int, tokens: int, width: int, packed: int, sum: int
) -> None: ...
def cross_add(
    isa: int,
    threads: int,
    a: int,
    b: int,
    tokens: int,
    height: int,
    width: int,
    packed_a: int,
    packed_b: int,
    sum: int,
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
def channels_measure(
    threads: int,
    bitmask: int,
    offsets: int,
    offset_bytes: int,
    out_features: int,
    in_features: int,
    nnz: int,
    tile: int,
    elem_bytes: int,
    starts: int,
) -> int: ...
def channels_fill(
    threads: int,
    bitmask: int,
    values: int,
    offsets: int,
    offset_bytes: int,
    out_features: int,
    in_features: int,
    nnz: int,
    tile: int,
    elem_bytes: int,
    starts: int,
    data: int,
) -> None: ...
def channels_unpack(
    isa: int,
    dtype: int,
    data: int,
    starts: int,
    out_features: int,
    in_features: int,
    tile: int,
    out: int,
    begin: int,
    end: int,
) -> None: ...
