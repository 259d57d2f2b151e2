"""`lorasft doctor`: is this machine fit for a run."""

from __future__ import annotations

from lorasft.commands import crash as campaign


def run(crash: str, trials: int, as_json: bool) -> None:
    """Kill small runs on the disk of the folder `crash`."""
    campaign.run(crash, trials=trials, as_json=as_json)
