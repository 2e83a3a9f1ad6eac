"""Choosing a device, and recognising that memory ran out."""

import pytest
import torch

from effnet_study import machine


@pytest.fixture
def without_working_gpu(monkeypatch, tmp_path):
    """A machine on which torch, built for CUDA, finds no GPU; and the path of a GPU's file, which is absent."""
    monkeypatch.setattr(machine, "GPU_FILES", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "nvidia3"


def test_a_gpu_that_torch_cannot_use_is_not_replaced_by_the_cpu(without_working_gpu, monkeypatch):
    assert machine.choose_device() == torch.device("cpu")
    without_working_gpu.with_name("nvidiactl").touch()  # as in a container that was given no GPU
    assert machine.choose_device() == torch.device("cpu")
    without_working_gpu.touch()
    for visible in (None, "0", "1,0", "GPU-8932f937"):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ValueError, match=r"for CUDA 13\.0 finds no GPU\. .* update the driver.* --device cpu"):
            machine.choose_device()
    assert machine.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["mps", "gpu", "tpu", torch.device("meta")])
def test_other_kinds_of_devices_are_refused(device):
    with pytest.raises(ValueError, match=f"device: expected cpu or cuda, got '{device}'"):
        machine.choose_device(device)


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_a_hidden_gpu_is_not_missed(without_working_gpu, monkeypatch, hidden):
    without_working_gpu.touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert machine.choose_device() == torch.device("cpu")


def test_a_torch_without_cuda_takes_the_cpu(without_working_gpu, monkeypatch):
    without_working_gpu.touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.choose_device() == torch.device("cpu")


@pytest.mark.parametrize("where", ["in the compiler", "while tracing"])
def test_out_of_memory_within_torch_compile(where):
    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    def compiler(graph, inputs):
        return run_out()

    if where == "in the compiler":
        compiled = torch.compile(lambda x: x + 1, backend=compiler)
    else:
        from torch._dynamo.exc import InternalTorchDynamoError

        def compiled(x):  # as torch._dynamo.convert_frame does
            try:
                run_out()
            except Exception as error:
                raise InternalTorchDynamoError(f"{type(error).__qualname__}: {error}") from None

    with pytest.raises(RuntimeError) as raised:  # the kind that a training run catches
        compiled(torch.ones(3))
    assert not isinstance(raised.value, torch.OutOfMemoryError) and machine.out_of_memory(raised.value)


@pytest.mark.parametrize(
    "message, expected",
    [
        ("GET was unable to find an engine to execute this computation", True),
        ("FIND was unable to find an engine to execute this computation", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: out of memory", True),
        ("out of resource: shared memory, Required: 262144, Hardware limit: 232448", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_messages_about_memory(message, expected):
    assert machine.out_of_memory(RuntimeError(message)) == expected
