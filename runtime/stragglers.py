"""Workers that sit a step out: others do again what they did of it, and they come back when they are done.

A worker adds its units up as it computes them, so what it has under way cannot be taken out of its sums: all that it
did of the step is done again, and it forgets that. What was done twice is compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.groups import Handle, WorkersLost
from runtime.plan import Plan
from runtime.transition import Crew
from runtime.work import FIRST_PATIENCE, SLACK, Late
from storage.codec import decode
from storage.records import Receipt, UnitRecord


@dataclass(kw_only=True, eq=False)
class Sitting:
    """A straggler that sits a step out, by the place that it had."""

    late: Late
    place: str
    waits: list[Handle]
    """What it is at: calls of units, and when these are done `forsake`."""
    forsaking: bool = False
    current: bool = True
    """Whether the state is the one that it holds."""
    made: dict[int, dict[str, bytes]] | None = None
    """Digests of what it made of each micro-batch after all, by what."""
    counted: list[tuple[str, UnitRecord]] | None = None
    """The units of its stage that count, and whose they are."""


class Stragglers:
    """Those of a crew that sit out. `note` is told what happens to them."""

    def __init__(self, crew: Crew, note: Callable[[str], None]) -> None:
        self._crew = crew
        self._note = note
        self._sitting: dict[str, Sitting] = {}
        self._back: dict[str, Sitting] = {}
        """Those that are done and have not been taken back."""
        self._doubles: list[Sitting] = []
        """Those whose units were done twice, until what both made is known."""

    @property
    def workers(self) -> list[str]:
        """Those that sit out."""
        return list(self._sitting)

    @property
    def stages(self) -> list[int]:
        """The stage of each that sits out."""
        return [sitting.late.stage for sitting in self._sitting.values()]

    def hold(self, stage: int) -> bool:
        """Whether one of them holds the state of a stage as it is."""
        some = (*self._sitting.values(), *self._back.values())
        return any(sitting.current and sitting.late.stage == stage for sitting in some)

    def sit_out(self, late: Late) -> None:
        """Leave a worker's place empty until it is done with what it has. Raises nothing (see Changes)."""
        crew, name = self._crew, late.worker
        place = next((place for place, member in crew.members.items() if member == name), name)
        if crew.joined.pop(name, None) is None:
            crew.gone[name] = f"sits out: {late.reason}"
        self._sitting[name] = sitting = Sitting(late=late, place=place, waits=list(late.handles))
        self._doubles.append(sitting)
        self._note(f"{place} sits out step {late.step}: {late.reason}")

    def outdate(self) -> None:
        """The state is about to change, and nobody who sits out is told."""
        for sitting in (*self._sitting.values(), *self._back.values()):
            sitting.current = False

    def back(self) -> list[tuple[str, int, bool]]:
        """Those that are done: (worker, stage, whether it holds the state as it is), each once."""
        for name, sitting in list(self._sitting.items()):
            self._go_on(name, sitting)
        self._judge()
        back, self._back = self._back, {}
        return [(name, sitting.late.stage, sitting.current) for name, sitting in back.items()]

    def _go_on(self, name: str, sitting: Sitting) -> None:
        """Have a straggler that is done with its calls forget the step; who takes too long is given up."""
        group, pace, late = self._crew.group, self._crew.pace, sitting.late
        finished = dict(group.wait(sitting.waits, 0.0))
        for error in finished.values():
            if isinstance(error, WorkersLost):
                raise error
        took = pace.now() - late.since
        if left := [handle for number, handle in enumerate(sitting.waits) if number not in finished]:
            sitting.waits = left
            if took > FIRST_PATIENCE:
                self._note(f"{sitting.place}, which sat out step {late.step}, is given up after {took:.0f} s")
                self.give_up(name)
                group.stop([name])
                pace.forget([name])
        elif sitting.forsaking:
            (sitting.made,) = group.get(sitting.waits)
            self._back[name] = self._sitting.pop(name)
        else:  # not sooner: Ray may run a call whose arguments come late after later ones
            usual = pace.mean(late.method, late.stage) or took
            pace.note(name, late.method, late.stage, min(took / len(late.handles), SLACK * usual))
            sitting.waits, sitting.forsaking = [group.call(name, "forsake", late.step)], True

    def give_up(self, name: str) -> None:
        """A worker does not come back."""
        self._back.pop(name, None)
        if sitting := self._sitting.pop(name, None):
            self._doubles.remove(sitting)

    def compare(self, step: int, receipts: Sequence[bytes]) -> None:
        """These are the receipts of what counts of a step: what stragglers made of it should be the same."""
        doubles = [double for double in self._doubles if double.late.step == step]
        if not doubles:
            return
        signed = [decode(Receipt, receipt) for receipt in receipts]
        units = [(receipt.worker, unit) for receipt in signed for unit in receipt.units]
        for double in doubles:
            double.counted = [(other, unit) for other, unit in units if Plan.place(other)[0] == double.late.stage]
        self._judge()

    def _judge(self) -> None:
        """Say so where two workers made different things of the same unit."""
        for double in list(self._doubles):
            if double.made is None or double.counted is None:
                continue
            self._doubles.remove(double)
            for other, unit in double.counted:
                made = double.made.get(unit.micro_batch, {})
                if what := [name for name, digest in made.items() if digest != getattr(unit, name)]:
                    self._note(
                        f"{double.place} and {other} made another {what[0]} of micro-batch {unit.micro_batch} in step "
                        f"{double.late.step}: audit the segment"
                    )
