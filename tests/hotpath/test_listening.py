"""Standing in for a module's ``forward``: each half counts, takes, passes on and raises alike."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.hotpath.halves import native
from tests.hotpath.test_walking import Walk
from tlcore.engine.calls import Call
from tlcore.hotpath.listening import Hearing, _Listening, listening_of, put_all, take_all
from tlcore.layout.structure import flatten


class Collector:
    """Notes what it is told; Python's half tells it all, the extension only what is new to its walk."""

    def __init__(self, walk: Walk | None) -> None:
        self.walk = walk
        self.told: list[Any] = []
        self.fails: BaseException | None = None

    def _note(self, *what: Any) -> None:
        self.told.append(what)
        if self.fails is not None:
            raise self.fails

    def inputs(self, sides: Call, args: Any, kwargs: Any) -> None:
        try:
            self.end_inputs(sides, (flatten(args, Walk()), flatten(kwargs, Walk())), kwargs)
        except Exception as error:
            self.broken(sides, "inputs", error)

    def outputs(self, sides: Call, output: Any) -> None:
        try:
            self.end_outputs(sides, flatten(output, Walk()))
        except Exception as error:
            self.broken(sides, "outputs", error)

    def end_inputs(self, sides: Call, unknown: Any, kwargs: Any) -> None:
        self._note("inputs", sides.call, unknown, sorted(kwargs))

    def end_outputs(self, sides: Call, unknown: Any) -> None:
        self._note("outputs", sides.call, unknown)

    def broken(self, sides: Call, direction: str, error: Exception) -> None:
        self.told.append(("broken", sides.call, direction, str(error)))

    def post_fwd_inputs(self, sides: Call, args: Any, kwargs: Any) -> None:
        self.told.append(("post", sides.call))


class Listener:
    """What each half asks of a listener."""

    def __init__(self, half: str, original: Callable[..., Any], post: bool = False) -> None:
        self.walk = Walk() if half == "C" else None
        self.collector = Collector(self.walk)
        self.hearing = Hearing()
        self.hearing.owner = threading.get_ident()
        self.own: dict[str, Any] = {"_forward_hooks": {}}
        self.sites: list[Any] = []
        self.handles: list[Any] = []
        self.later: Any = False
        given = (self.collector, self.hearing, self.own, self.sites, self.handles, post)
        self.listening = listening_of(None if self.walk is None else self.walk.walker, *given)
        self.listening.aim(original, None)

    def _is_covered(self) -> bool:
        return bool(self.own.get("forward"))

    def _new_call(self) -> Call | None:
        call = len(self.sites)
        self.sites.append(None if call == 2 else Call("m", call, f"m/call_{call}"))
        return self.sites[-1]  # type: ignore[no-any-return]

    def _raised(self, sides: Call, error: BaseException, args: Any, kwargs: Any) -> None:
        self.collector.told.append(("raised", sides.call, repr(error), error.__traceback__ is not None))

    def _hear_behind_hooks(self, sides: Call, args: Any, kwargs: Any) -> Any:
        self.collector.told.append(("behind", sides.call))
        return self.later

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.listening.hear(self, args, kwargs)


@pytest.fixture(params=["C", "Python"])
def half(request: pytest.FixtureRequest) -> str:
    if request.param == "C":
        native()
    return str(request.param)


def test_calls_are_counted_taken_and_passed_on(half: str) -> None:
    listener = Listener(half, lambda *args, **kwargs: (args, kwargs), post=True)
    tensor = torch.ones(2)
    for expected in range(4):
        args, kwargs = listener(tensor, 1, key="x")
        assert args[0] is tensor and args[1:] == (1,) and kwargs == {"key": "x"}
        assert listener.listening.count == expected + 1
    told = listener.collector.told
    # The third call is not wanted.
    assert [(each[0], each[1]) for each in told] == [
        (what, call) for call in (0, 1, 3) for what in ("inputs", "outputs", "post")
    ]
    assert told[0][3] == ["key"] and told[0][2][0] == ("tuple", ("tensor", "scalar"))


def test_a_call_without_keywords_passes_none_on(half: str) -> None:
    def original(x: int, *rest: int, **more: int) -> tuple[Any, ...]:
        return x, rest, more

    assert Listener(half, original)(1, 2) == (1, (2,), {})
    assert Listener(half, len)([1, 2]) == 2


def test_calls_of_other_threads_and_between_steps_are_passed_on(half: str) -> None:
    listener = Listener(half, lambda: 1)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(listener()))
    thread.start()
    thread.join(10)
    assert found == [1] and listener.listening.elsewhere == 1
    listener.hearing.owner = 0
    assert listener() == 1 and listener.listening.elsewhere == 1 and listener.listening.count == 0
    assert not listener.collector.told


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt("no"), SystemExit(3)])
def test_what_the_module_raises_is_noted_and_raised(half: str, error: BaseException) -> None:
    def fails() -> None:
        raise error

    listener = Listener(half, fails)
    with pytest.raises(type(error)) as caught:
        listener()
    assert caught.value is error and error.__context__ is None
    assert listener.collector.told[-1] == ("raised", 0, repr(error), True)
    listener.hearing.owner = 0
    with pytest.raises(type(error)):
        listener()
    assert len(listener.collector.told) == 2


def test_a_step_that_ends_inside_the_call_takes_nothing_more(half: str) -> None:
    listener = Listener(half, lambda: setattr(listener.hearing, "owner", 0))
    listener()
    assert [each[0] for each in listener.collector.told] == ["inputs"]


@pytest.mark.parametrize("later", [True, False])
def test_hooks_of_others_are_asked_about(half: str, later: bool) -> None:
    listener = Listener(half, lambda: 1)
    listener.own["_forward_hooks"]["somebody"] = 1
    listener.later = later
    assert listener() == 1
    expected = ["inputs", "behind"] if later else ["inputs", "behind", "outputs"]
    assert [each[0] for each in listener.collector.told] == expected


def test_hooks_of_all_modules_are_asked_about_too(half: str) -> None:
    listener = Listener(half, lambda: 1)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        listener()
    finally:
        handle.remove()
    assert ("behind", 0) in listener.collector.told
    # A module without such a dictionary has none.
    del listener.own["_forward_hooks"]
    assert listener() == 1 and ("behind", 1) not in listener.collector.told


def test_what_cannot_be_taken_is_told_and_the_model_goes_on(half: str) -> None:
    listener = Listener(half, lambda: 1)
    listener.collector.fails = LookupError("no room")
    assert listener() == 1
    broken = [each for each in listener.collector.told if each[0] == "broken"]
    assert broken == [("broken", 0, "inputs", "no room"), ("broken", 0, "outputs", "no room")]
    listener.collector.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        listener()


def test_the_collector_is_called_while_chunks_are_full() -> None:
    listener = Listener("C", lambda x: x)
    assert listener.walk is not None
    full: list[int] = []
    listener.walk.walker.watch(full)
    tensor = torch.ones(1)
    listener(tensor)
    # Now the sides are known.
    call = listener.sites[0]
    call.inputs[("tuple", ("tensor",))], call.outputs["tensor"] = "in", "out"
    for count, chunks in ((0, []), (2, [1])):
        full[:] = chunks
        listener.listening.count = 0
        listener.collector.told.clear()
        listener(tensor)
        assert len(listener.collector.told) == count
    assert listener.walk.walker.leaving


def test_what_comes_again_is_taken_as_the_first_time() -> None:
    returned: list[Any] = [None]
    listener = Listener("C", lambda *args, **kwargs: returned[0])
    walk = listener.walk
    assert walk is not None
    sides: list[Any] = []
    walk.walker.use(sides, walk.specs, walk.memories, walk.offsets, walk.scalars)
    one, other = torch.arange(3.0), torch.arange(4.0).view(2, 2)
    walk.walker.flatten([one, other])
    # What might be taken for one another stands side by side.
    values: list[Any] = [one, torch._neg_view(one), other, other.t(), (one,), [one], [one] * 20, {"a": one}]
    values += [{1: one}, {"b": one}, {"a": one, "b": {"c": 2.5}}, {"b": one, "a": {"c": 2.5}}, {"a": one}, {}]
    values += [
        [one, (other, 1)],
        [one, (other, None)],
        [[[[[[[[[[one]]]]]]]]]],
        (),
        None,
        "text",
        True,
        object,
    ]
    for kwargs in ({}, {"k": one}):
        for value in [each for pair in itertools.pairwise(values) for each in (*pair, *pair)]:
            returned[0], listener.listening.count, walk.memory.bytes = value, 0, 0
            for found in (sides, walk.specs, walk.memories, walk.offsets, walk.scalars):
                found.clear()
            listener(value, **kwargs)
            expected = Walk()
            expected.walker.flatten([one, other])
            before = len(expected.specs)
            sketches = [expected.walker.flatten(part) for part in ((value,), kwargs, value)]
            assert walk.taken == expected.taken[before:]
            assert list(map(repr, walk.scalars)) == list(map(repr, expected.scalars))
            # The sides of what was known; the others are told.
            known = [("in", sketches[0], sketches[1]), ("out", sketches[2])]
            assert len(sides) + len(listener.collector.told) == 2
            assert all(side in known for side in sides)
            _answer(listener)


def _answer(listener: Listener) -> None:
    """Make the structures known that the collector was told of."""
    call = listener.sites[0]
    for told in listener.collector.told:
        if told[0] == "inputs":
            positional, keywords = told[2]
            call.inputs[(positional, keywords) if told[3] else positional] = ("in", positional, keywords)
        else:
            call.outputs[told[2]] = ("out", told[2])
    listener.collector.told.clear()


def test_what_backward_computes_once_more_is_passed_on(half: str) -> None:
    listener = Listener(half, lambda x: x * 2)
    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(listener, x, use_reentrant=False).sum().backward()
    assert listener.listening.count == 1 and x.grad is not None and x.grad.tolist() == [2, 2]
    # Also in the thread of a backward that is not the step's own.
    listener.hearing.owner += 1
    torch.utils.checkpoint.checkpoint(listener, x, use_reentrant=False).sum().backward()
    assert listener.listening.elsewhere == 1


def test_what_others_put_around_it_within_a_step_is_noted(half: str) -> None:
    listener = Listener(half, lambda: 1)
    listener.own["forward"] = listener
    listener()
    assert not listener.listening.covered
    listener.own["forward"] = "somebody's"
    listener()
    assert listener.listening.covered
    listener.own["forward"] = listener
    # It takes more than a deletion, as somebody is to be told.
    assert take_all([listener], [listener.listening], 0) == 0


def test_which_call_runs_is_known_also_in_recursion_and_after_errors(half: str) -> None:
    seen: list[int] = []

    def original(depth: int, fails: bool) -> None:
        seen.append(listener.listening.running)
        if depth:
            listener(depth - 1, fails)
            seen.append(listener.listening.running)
        elif fails:
            raise ValueError("it fails")

    listener = Listener(half, original)
    assert listener.listening.running == -1
    listener(1, False)
    with pytest.raises(ValueError, match="it fails"):
        # The third call is not wanted, and counts all the same.
        listener(1, True)
    assert seen == [0, 1, 0, 2, 3] and listener.listening.running == -1


def test_one_that_is_deafened_hears_nobody(half: str) -> None:
    listener = Listener(half, lambda: 1)
    listener.listening.deafen(Hearing())
    assert listener() == 1 and not listener.collector.told and listener.listening.dead


def test_many_are_put_in_place_and_taken_away_up_to_the_first_unusual_one(half: str) -> None:
    many: list[Any] = [Listener(half, lambda: 1) for _ in range(6)]
    listening = [each.listening for each in many]
    many[2].own["forward"] = "somebody's"
    many[4].listening.dead = True
    places = [put_all(many, listening, 0), put_all(many, listening, 3), put_all(many, listening, 5)]
    assert places == [2, 4, 6]
    assert [each.own.get("forward") is each for each in many] == [True, True, False, True, False, True]
    many[1].own["forward"] = "somebody's"
    many[3].handles.append("a hook")
    places = [take_all(many, listening, 0), take_all(many, listening, 2), take_all(many, listening, 3)]
    assert places == [1, 2, 3] and take_all(many, listening, 5) == 6
    assert "forward" not in many[0].own and "forward" not in many[5].own and "forward" in many[3].own


def test_what_makes_no_sense_is_refused() -> None:
    walker = Walk().walker
    refused: list[Any] = [
        (walker, 1, object(), {}, [], [], False),
        (object(), 1, Hearing(), {}, [], [], False),
        (walker, 1, Hearing(), {}, (), [], False),
    ]
    for given in refused:
        with pytest.raises(TypeError):
            native().Listening(*given)
    empty = native().Listening.__new__(native().Listening)
    with pytest.raises(RuntimeError):
        empty.hear(1, (), {})
    with pytest.raises(RuntimeError):
        empty.aim(1, 2)
    listener = Listener("C", lambda: 1)
    refused = [(), (1, 2, 3), (1, (), []), (1, (), {}, 4)]
    for wrong in refused:
        with pytest.raises(TypeError):
            listener.listening.hear(*wrong)
    with pytest.raises(TypeError):
        native().put_all([1], [empty], 0)
    with pytest.raises(IndexError):
        native().put_all([], [listener.listening], 0)
    assert native().put_all([], [], -5) == -5


def test_a_listener_in_a_circle_is_collected(half: str) -> None:
    listener = Listener(half, lambda: 1)
    listener.own["self"] = listener
    listener()
    listener.sites[0].inputs["self"] = listener
    gone = weakref.ref(listener)
    del listener
    gc.collect()
    assert gone() is None


def test_the_python_half_stands_in_where_there_is_no_walk() -> None:
    assert type(Listener("Python", len).listening) is _Listening
    assert type(Listener("C", len).listening) is native().Listening
