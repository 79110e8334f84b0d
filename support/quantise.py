"""INT8: an OpenVINO IR quantised by NNCF, its ranges taken on photos. NNCF is in requirements-int8.txt."""

import logging


def decoding_names(model):
    """The operators after an IR's last convolutions: they decode boxes, and INT8 is too coarse for pixels."""
    waiting = [result.get_node() for result in model.outputs]
    names = set()
    while waiting:
        for node in (value.get_node() for value in waiting.pop().input_values()):
            name = node.get_friendly_name()
            if node.get_type_name() not in ("Convolution", "Constant", "Parameter") and name not in names:
                names.add(name)
                waiting.append(node)
    return sorted(names)


def quantise(model, count, load):
    """Quantise an IR to INT8 weights and activations with NNCF, its ranges taken on `count` photos.

    `load(n)` gives photo n as a dict of the IR's inputs.
    """
    logging.disable(logging.WARNING)  # NNCF and its imports log a lot
    try:
        import nncf
        import rich
        rich.reconfigure(quiet=True)  # NNCF's progress bars
        # PERFORMANCE is symmetric. MIXED, with zero points, was 3 % slower and not more accurate.
        return nncf.quantize(model, nncf.Dataset(range(count), load),
                             preset=nncf.QuantizationPreset.PERFORMANCE, subset_size=count,
                             ignored_scope=nncf.IgnoredScope(names=decoding_names(model)))
    finally:
        logging.disable(logging.NOTSET)
