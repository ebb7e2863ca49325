"""Who a request is, and whose the images are that an encoder works on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlcore.adapters.vllm.worker.identity import identity, names_items, patch_requests
from tlcore.adapters.vllm.worker.items import item_sets
from tlcore.layout.rows import row_set_of


def _request(**keys: Any) -> Any:
    given = {"prompt_token_ids": [5, 6], "prompt_embeds": None, "lora_request": None, "mm_features": []}
    return SimpleNamespace(**{**given, **keys})


def _image(name: str, offset: int = 1) -> Any:
    where = SimpleNamespace(offset=offset, length=4, is_embed=None)
    return SimpleNamespace(mm_hash=name, identifier=f"lora:{name}", mm_position=where)


OTHERS: list[dict[str, Any]] = [
    {"prompt_token_ids": [6, 5]},
    {"lora_request": SimpleNamespace(lora_name="one")},
    {"lora_request": SimpleNamespace(lora_name="two")},
    {"mm_features": [_image("x")]},
    {"mm_features": [_image("y")]},
    {"mm_features": [_image("x", 2)]},
    {"mm_features": [_image("x"), _image("y", 9)]},
    {"cache_salt": "a"},
    {"cache_salt": "b"},
    {"prompt_token_ids": None, "prompt_embeds": torch.ones(2, 3)},
    {"prompt_token_ids": None, "prompt_embeds": torch.ones(2, 3, dtype=torch.bfloat16)},
    {"prompt_token_ids": None, "prompt_embeds": torch.ones(3, 2)},
    {"prompt_token_ids": None, "prompt_embeds": torch.zeros(2, 3)},
]


def test_all_that_a_prompts_states_depend_on_is_in_its_hash() -> None:
    hashes = [identity(_request(**keys))["prompt_hash"] for keys in [{}, *OTHERS]]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [identity(_request(**keys))["prompt_hash"] for keys in [{}, *OTHERS]]


def test_the_adapters_name_is_told_and_what_cannot_be_hashed_has_no_hash() -> None:
    assert identity(_request(lora_request=SimpleNamespace(lora_name="one")))["adapter"] == "one"
    assert "adapter" not in identity(_request())
    assert identity(_request(prompt_token_ids=None)) == {}
    assert identity(SimpleNamespace(prompt_token_ids="unknown")) == {}


def test_where_items_are_numbered_through_what_is_in_them_is_hashed() -> None:
    """Without caches vLLM calls the first image of each engine the same, whatever it shows."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(mm_processor_cache_gb=0)),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
    )
    named = names_items(config)

    def hashed(number: int, pixels: torch.Tensor | None, request: str = "a") -> str:
        image = _image(f"renderer0-mm-{number}-image-0")
        sizes = SimpleNamespace(data=[torch.tensor(4), 7])
        image.data = pixels if pixels is None else {"pixels": SimpleNamespace(data=pixels), "sizes": sizes}
        return str(identity(_request(mm_features=[image], req_id=request), named)["prompt_hash"])

    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    assert hashed(1, one) == hashed(2, one) != hashed(1, other)
    assert hashed(1, one) != hashed(1, one.to(torch.bfloat16)) and hashed(1, one) != hashed(1, one.T)
    assert hashed(1, None) != hashed(1, None, "b")
    config.cache_config.enable_prefix_caching = True
    assert names_items(config) and names_items(SimpleNamespace()) and names_items(None)


def test_the_salt_comes_from_the_scheduler() -> None:
    class NewRequestData:
        @classmethod
        def from_request(cls, request: Any, block_ids: Any) -> Any:
            return cls()

    module: Any = SimpleNamespace(NewRequestData=NewRequestData)
    patch_requests(module)
    patch_requests(module)
    assert NewRequestData.from_request(SimpleNamespace(cache_salt="a"), ()).cache_salt == "a"
    assert not hasattr(NewRequestData.from_request(SimpleNamespace(cache_salt=None), ()), "cache_salt")


class _Flat:
    """As vLLM calls what is joined along the first dimension."""


class MultiModalFlatField(_Flat):
    """Its name tells."""


def _runner(*items: tuple[str, Any, int]) -> Any:
    """A runner with these items: request, where its tokens stand, how many patches it has."""
    requests: dict[str, Any] = {}
    for request, where, patches in items:
        element = SimpleNamespace(data=torch.ones(patches, 2), field=MultiModalFlatField())
        feature = SimpleNamespace(mm_position=where, data={"pixel_values": element})
        requests.setdefault(request, SimpleNamespace(mm_features=[])).mm_features.append(feature)
    return SimpleNamespace(requests=requests)


def _where(offset: int, length: int, mask: list[bool] | None = None) -> Any:
    return SimpleNamespace(
        offset=offset, length=length, is_embed=None if mask is None else torch.tensor(mask)
    )


def test_images_belong_to_their_requests_in_whatever_order_and_number() -> None:
    first, second, third = _where(1, 4), _where(2, 6, [True, True, False, True, True, True]), _where(9, 4)
    runner = _runner(("b", first, 16), ("c", second, 20), ("c", third, 16))
    refs = [("c", second), ("b", first), ("c", third)]
    sets = item_sets(runner, refs, lambda request: {"external_request_id": request.upper()})

    def owners(*shape: int) -> list[tuple[Any, ...]] | None:
        found = row_set_of(shape, False, sets)
        return (
            None
            if found is None
            else [(span.row["request_id"], span.begin, span.length, span.first) for span in found.spans]
        )

    assert owners(3, 3, 28, 28) == [("c", 0, 1, 2), ("b", 1, 1, 1), ("c", 2, 1, 9)]
    assert owners(13, 8) == [("c", 0, 2, 2), ("c", 2, 3, 5), ("b", 5, 4, 1), ("c", 9, 4, 9)]
    # Patches have an owner, and no position among the tokens.
    assert owners(52, 8) == [("c", 0, 20, None), ("b", 20, 16, None), ("c", 36, 16, None)]
    assert owners(4, 8) is None


@pytest.mark.parametrize("patches", [(4, 6), (6, 4)])
def test_patches_and_tokens_of_one_number_are_told_apart_or_nobodys(patches: tuple[int, int]) -> None:
    first, second = _where(1, 4), _where(1, 6)
    runner = _runner(("a", first, patches[0]), ("b", second, patches[1]))
    found = row_set_of((10, 8), False, item_sets(runner, [("a", first), ("b", second)], lambda request: {}))
    if patches == (6, 4):
        assert found is None
        return
    # Where both divide the rows alike their owner is known, and not whether they are tokens.
    assert found is not None
    assert [(span.row["request_id"], span.length, span.first) for span in found.spans] == [
        ("a", 4, None),
        ("b", 6, None),
    ]


def test_what_one_image_among_several_may_have_belongs_to_nobody() -> None:
    """Three clients' images in a list, each of three channels; and each one's tokens apart."""
    places = [_where(1, 3), _where(2, 6), _where(9, 4)]
    requests: dict[str, Any] = {}
    for request, where in zip("abc", places, strict=True):
        element = SimpleNamespace(data=torch.ones(3, 28, 28), field=SimpleNamespace())
        feature = SimpleNamespace(mm_position=where, data={"pixel_values": element})
        requests[request] = SimpleNamespace(mm_features=[feature])
    refs, runner = list(zip("abc", places, strict=True)), SimpleNamespace(requests=requests)
    several = item_sets(runner, refs, lambda request: {})
    for shape in ((3, 28, 28), (3, 8), (6, 8), (4, 8)):
        assert row_set_of(shape, False, several) is None
    assert row_set_of((3,), True, several) is several[0]
    assert row_set_of((13, 8), False, several) is several[1]
    # Of one image alone there is no doubt.
    alone = item_sets(runner, refs[:1], lambda request: {})
    assert row_set_of((3, 8), False, alone) is alone[1] and not alone[0].single
