"""Networks: tensors in, tensors out. Only families build them."""
