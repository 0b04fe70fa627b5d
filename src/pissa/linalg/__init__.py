"""Linear algebra on one matrix: truncated SVD and measures of it."""

from pissa.linalg.alternate import alternate
from pissa.linalg.components import Components
from pissa.linalg.measures import (
    effective_rank,
    frobenius,
    nuclear,
    principal_angles,
    product_singular_values,
    relative_error,
)
from pissa.linalg.svd import Certificate, LowRank, full_svd, truncated_svd

__all__ = [
    "Certificate",
    "Components",
    "LowRank",
    "alternate",
    "effective_rank",
    "frobenius",
    "full_svd",
    "nuclear",
    "principal_angles",
    "product_singular_values",
    "relative_error",
    "truncated_svd",
]
