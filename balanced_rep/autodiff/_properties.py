"""Functions that need no rule: metadata, results that are decided by the primal, and what is refused with a reason."""

from __future__ import annotations

__all__ = [
    "FACTORIES", "LIKE_FACTORIES", "METADATA", "METADATA_FIELDS", "PRIMAL_DECIDES", "RANDOM", "REFUSED",
    "TANGENT_STOPS", "VIEWS_WITHOUT_RULE",
]  # fmt: skip

METADATA = frozenset({
    "size", "dim", "ndimension", "stride", "storage_offset", "numel", "nelement", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "element_size", "get_device", "__len__", "is_same_size", "has_names", "is_inference",
    "is_conj", "is_neg", "__hash__", "__repr__", "__str__", "__format__", "__dir__", "is_tensor", "is_coalesced",
    "dim_order", "is_shared", "register_hook", "_is_view", "__class__", "can_cast", "is_storage",
})  # fmt: skip

METADATA_FIELDS = frozenset({
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "names", "name",
    "itemsize", "nbytes", "output_nr", "_version", "_base", "_backward_hooks", "_post_accumulate_grad_hooks",
    "retains_grad", "is_cpu", "is_cuda", "is_ipu", "is_meta", "is_mkldnn", "is_mps", "is_mtia", "is_nested", "is_ort",
    "is_quantized", "is_sparse", "is_sparse_csr", "is_vulkan", "is_xla", "is_xpu", "is_hpu", "is_maia", "_cdata",
})  # fmt: skip

# The result holds no derivative by nature: booleans, integers. Data-dependent control flow follows the primal.
PRIMAL_DECIDES = frozenset({
    "eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "greater",
    "greater_equal", "less", "less_equal", "not_equal", "isclose", "isnan", "isinf", "isfinite", "isposinf", "isneginf",
    "isreal", "signbit", "logical_not", "logical_and", "logical_or", "logical_xor", "any", "all", "argmax", "argmin",
    "argsort", "nonzero", "argwhere", "count_nonzero", "bucketize", "searchsorted", "equal", "allclose", "is_nonzero",
    "__bool__", "__nonzero__", "__contains__", "result_type", "is_distributed", "long", "int", "bool", "short", "char",
    "byte", "isin", "bincount", "floor_divide", "__floordiv__", "__rfloordiv__", "__index__", "__int__", "__long__",
    "_assert_tensor_metadata", "_assert_async",
})  # fmt: skip

# The value leaves the tensor world, or the caller asks for no derivative: as torch.func.jvp does, and counted.
TANGENT_STOPS = frozenset({"detach", "data", "item", "tolist", "__float__", "__complex__"})

FACTORIES = frozenset(
    {"zeros", "ones", "empty", "full", "empty_strided", "empty_permuted", "eye", "arange", "linspace"}
)
LIKE_FACTORIES = frozenset({
    "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full",
    "new_tensor", "new_empty_strided",
})  # fmt: skip

RANDOM = frozenset({
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
    "multinomial", "poisson", "binomial", "bernoulli_", "uniform_", "normal_", "exponential_", "cauchy_", "geometric_",
    "log_normal_", "random_", "gumbel_softmax", "standard_gamma", "_standard_gamma", "native_dropout",
    "fractional_max_pool2d", "fractional_max_pool3d", "fractional_max_pool2d_with_indices",
    "fractional_max_pool3d_with_indices",
})  # fmt: skip

_RAW = "hands out raw memory, where tangents cannot follow; register a rule for the function that wants it"
_SHAPE = "changes the shape or strides of a tensor in place; use the form without the underscore"
_AUTOGRAD = "belongs to reverse mode; br.jvp runs without it"
REFUSED = {
    **dict.fromkeys(
        ("numpy", "__array__", "__array_wrap__", "data_ptr", "untyped_storage", "storage", "_typed_storage",
         "__dlpack__", "__dlpack_device__", "__cuda_array_interface__", "storage_type", "share_memory_"),
        _RAW,
    ),
    **dict.fromkeys(
        ("squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "set_",
         "as_strided_"),
        _SHAPE,
    ),
    **dict.fromkeys(("backward", "retain_grad", "requires_grad_", "grad_sample"), _AUTOGRAD),
    **dict.fromkeys(
        ("as_strided", "as_strided_copy", "as_strided_scatter"),
        "reinterprets memory; use view, narrow, unfold or indexing",
    ),
    "detach_": "cuts the tangent off in place; use x = x.detach()",
    "quantize_per_tensor": "rounds to integers: its derivative is zero almost everywhere. Use the float model",
    "quantize_per_channel": "rounds to integers: its derivative is zero almost everywhere. Use the float model",
    "__reduce_ex__": "would pickle a value with tangents",
    "to_sparse": "makes a sparse tensor, which cannot carry tangents here",
    "to_mkldnn": "makes an opaque tensor, which cannot carry tangents here",
    "apply_": "applies Python code to elements, which has no derivative",
    "map_": "applies Python code to elements, which has no derivative",
}  # fmt: skip

# They may return a view: a copy made by the fallback would silently miss writes through it.
VIEWS_WITHOUT_RULE = frozenset({
    "refine_names", "rename", "align_to", "align_as", "align_tensors", "values", "indices",
})  # fmt: skip
