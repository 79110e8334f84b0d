"""A function of tensors as CUDA graphs: recorded once for each shape, replayed without Python's delays."""

import torch


class Graphs:
    """Calls `function(*tensors)`, work on the GPU, from a CUDA graph for each shape (see PyTorch's notes).

    The function must not wait for the GPU. What it changes, such as gradients, exists before the first call.
    `buffers` (batch norm's statistics) are put back after recording, which runs it a few times. The next call
    overwrites the output."""

    def __init__(self, function, buffers):
        self.function, self.buffers = function, list(buffers)
        self.recorded, self.pool = {}, None

    def __call__(self, *tensors):
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record(tensors)
        graph, inputs, output = self.recorded[shapes]
        for own, given in zip(inputs, tensors):
            own.copy_(given, non_blocking=True)
        graph.replay()
        return output

    def record(self, tensors):
        """Record the function on tensors of these shapes: (graph, input tensors, output tensor)."""
        inputs = [torch.empty_like(tensor, device="cuda").copy_(tensor) for tensor in tensors]
        before = [buffer.clone() for buffer in self.buffers]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # warm up
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may page-lock memory meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self.function(*inputs)
        self.pool = graph.pool()
        for buffer, value in zip(self.buffers, before):
            buffer.copy_(value)
        return graph, inputs, output
