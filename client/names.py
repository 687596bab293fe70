"""Names for containers that nobody named: two words and, when these are taken, a number."""

from __future__ import annotations

import os

_HOW = """
agile amber ample ardent balmy bold brave breezy bright brisk calm candid cheery civil clear clever cosy crisp
daring deft eager early fair fleet fond frank fresh gentle glad golden grand hardy hearty humble jolly keen kind
lively loyal lucid lucky mellow merry mild modest neat nimble noble patient plucky polite proud quick quiet ready
robust serene sharp silver sincere smart snug sober steady stout sunny sure swift tidy trim true upbeat vivid warm
wise witty zesty
"""
# what sails, and who sails with it
_WHAT = """
albatross barge bark barque boatswain bosun brig caique canoe captain caravel carrack catboat clipper cog coracle
cormorant cutter dhow dinghy dory drifter felucca ferry frigate galleon galley gannet gig gull hooker jib junk kayak
keel ketch launch ligger lugger mate navigator osprey oyster packet petrel pilot pinnace porpoise punt purser rower
sailor scow scull seal shallop skiff skipper sloop smack steward tender tern trawler wharf yawl
"""


def random_name(attempt: int = 0) -> str:
    """A name such as `steady_lugger`; from the third attempt on with a number behind it."""
    how, what = _HOW.split(), _WHAT.split()
    first, second, number = os.urandom(3)
    tail = str(number) if attempt > 1 else ""
    return f"{how[first % len(how)]}_{what[second % len(what)]}{tail}"


def random_id() -> str:
    """An id as docker's: 64 hexadecimal digits."""
    return os.urandom(32).hex()
