"""What Hollow counts as free on a card, and what it frees there: a card, and the allocator of dynamic VRAM, stood in
for. ComfyUI's bookkeeping over both is the real one."""

from typing import Any

import pytest
import torch

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import comfy.model_management
import comfy.model_patcher
from comfy.model_patcher import ModelPatcher
from hollow_pack.nodes.host.memory import clear_device, free_bytes

GIB = 2**30
CARD, CPU = torch.device("cuda", 0), torch.device("cpu")


class Card:
    """8 GiB, of which other programs hold 1. torch holds 1.5, half a GiB of it in use; pages are dynamic VRAM's."""

    total, others, reserved, active, pages = 8 * GIB, GIB, 3 * GIB // 2, GIB // 2, 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        management = comfy.model_management
        for name, stand_in in {
            "mem_get_info": lambda _: (self.total - self.others - self.reserved - self.pages, self.total),
            "memory_allocated": lambda _: self.active,
            "memory_stats": lambda _: {
                "active_bytes.all.current": self.active,
                "reserved_bytes.all.current": self.reserved,
            },
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(management, "get_torch_device", lambda: CARD)
        monkeypatch.setattr(management, "current_loaded_models", [])
        if hasattr(management, "get_all_torch_devices"):
            monkeypatch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: [CARD])


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def test_all_but_other_programs_memory_is_free(card: Card) -> None:
    model = ModelPatcher(torch.nn.Linear(8, 8), CARD, CPU)
    assert free_bytes(model) == 7 * GIB
    card.active = card.reserved = 3 * GIB  # a model is loaded, which will leave
    assert free_bytes(model) == 7 * GIB


@pytest.mark.skipif(
    not hasattr(comfy.model_patcher, "ModelPatcherDynamic"), reason="This ComfyUI knows no dynamic VRAM"
)
def test_models_in_dynamic_vram_count_as_free_and_leave(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.memory_management
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar

    class Pages:
        """A model's in dynamic VRAM."""

        def loaded_size(self) -> int:
            return card.pages

        def free_memory(self, size: float) -> int:
            freed = min(int(size), card.pages)
            card.pages -= freed
            return freed

    class NoPinnedMemory:
        size = 0

        def __init__(self, *_: Any) -> None: ...

    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbars_analyze", lambda *_: card.pages)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", NoPinnedMemory)
    model = comfy.model_patcher.ModelPatcherDynamic(torch.nn.Linear(8, 8), CARD, CPU)
    model.model.dynamic_vbars[CARD] = Pages()
    loaded = comfy.model_management.LoadedModel(model)
    loaded.real_model = lambda: model.model
    loaded.model_finalizer = type("Finalizer", (), {"detach": lambda _: None})()
    comfy.model_management.current_loaded_models.append(loaded)

    card.pages = 3 * GIB
    assert comfy.model_management.get_free_memory(CARD) == 7 * GIB // 2  # what torch does not use, and what nobody has
    assert free_bytes(model) == 7 * GIB
    clear_device(model)
    assert card.pages == 0
    assert comfy.model_management.current_loaded_models == []
    assert free_bytes(model) == 7 * GIB
