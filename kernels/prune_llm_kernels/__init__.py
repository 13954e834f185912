"""Linear layers over packed sparse weights: tensors in, tensors out; knows no model and no file.

Importing this builds and loads nothing; the C++ extension is loaded when an op first needs it.
"""

from prune_llm_kernels.channel_weight import ChannelWeight as ChannelWeight
from prune_llm_kernels.channel_weight import to_channels as to_channels
from prune_llm_kernels.dispatch import BACKENDS as BACKENDS
from prune_llm_kernels.ops import channel_linear as channel_linear
from prune_llm_kernels.ops import dense_linear as dense_linear
from prune_llm_kernels.ops import sparse_linear as sparse_linear
from prune_llm_kernels.ops import unpack as unpack
from prune_llm_kernels.packed_weight import PackedWeight as PackedWeight
