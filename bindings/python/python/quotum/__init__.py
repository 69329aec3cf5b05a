"""One token budget for a whole fleet of LLM proxy pods, without a store."""

import atexit as _atexit

from . import _quotum
from ._denied import Denied
from ._quotum import Limiter, Permit, Quota, Standing

__all__ = ["Denied", "Limiter", "Permit", "Quota", "Standing"]

# An interpreter that ends must not be called by a thread that goes on.
_atexit.register(_quotum.stop)
