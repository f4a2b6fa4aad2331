"""Agents with different roles that share skill texts, each in an order of its own.

    python -m eval.examples.multi_agent [--url URL] [--chat-template NAME]

Start the server first: ``python -m sglang_pic.launch_server --model-path M``.
Three specialists work at the same time, then an editor reads their notes. No
two prompts open alike, yet each skill is computed once.
"""

from __future__ import annotations

from typing import Any

import sglang as sgl

from sglang_pic.lang import pic_segment

from .show import connect, show

SKILLS = {
    "budget": pic_segment("""\
Skill: keeping a budget.
Write down every cost as an item with a number and a unit price. Add a tenth of the sum as a \
reserve, and never spend the reserve on something that was known from the start. Ask for two \
offers whenever an item costs more than fifty coins. If the sum is above the limit, drop the \
item that the fewest guests would miss, and say which one it was. Round each price up to a whole \
coin, so that the surprise at the end is a pleasant one.
"""),
    "weather": pic_segment("""\
Skill: planning for weather.
Assume that it rains on one day in three. Everything that happens outdoors needs a roof that \
is at most a hundred steps away. Put nothing electric on the ground. In strong wind take down \
the tents before the guests ask for it, beginning with the largest. Choose the shady side of \
the square for food and the sunny side for music. Decide at eight in the morning whether the \
day goes as planned, and tell everybody by nine.
"""),
    "safety": pic_segment("""\
Skill: keeping people safe.
Leave a lane three metres wide through the middle for an ambulance and let nobody park there. \
Each stove stands on stone and has a bucket of sand beside it. Name one person who can be \
reached at any time, and print the number on every poster. Children get a ribbon with the name \
of the adult they came with. Count the visitors at the gate and close it at four hundred. When \
something goes wrong, stop the music first, because then people listen.
"""),
    "writing": pic_segment("""\
Skill: writing clearly.
Say the most important thing in the first sentence. Use short words, and one thought a \
sentence. Give numbers as digits and names in full. Write what people shall do, not what they \
should avoid. Leave out greetings, apologies and everything that the reader knows already. If \
there is a choice to be made, recommend one of the options and give the reason in half a line. \
Read the text once more and remove the weakest sentence.
"""),
}

TASK = "The village of Aldmoor holds a summer fair for 300 guests with a limit of 900 coins."

# Role and skills, in the order in which each agent was given them.
SPECIALISTS = [
    ("the treasurer of the fair", ["budget", "writing", "safety"]),
    ("the stage manager of the fair", ["weather", "safety", "writing"]),
    ("the warden of the fair", ["safety", "weather", "budget"]),
]
EDITOR = ("the editor of the programme", ["writing", "budget", "weather", "safety"])


@sgl.function
def agent(s: Any, role: str, skills: list[str], job: str) -> None:
    s += sgl.system(f"You are {role}. Follow your skills.")
    with s.user():
        for skill in skills:
            s += SKILLS[skill] + "\n"
        s += job
    s += sgl.assistant(sgl.gen("notes", max_tokens=40, temperature=0))


def main() -> None:
    endpoint = connect(__doc__)
    job = f"{TASK} Name the one thing that you will take care of first."
    states = agent.run_batch(
        [{"role": role, "skills": skills, "job": job} for role, skills in SPECIALISTS],
        backend=endpoint,
    )
    for (role, skills), state in zip(SPECIALISTS, states, strict=True):
        show(state, "notes", f"{role}  ({', '.join(skills)})")
    notes = "\n".join(
        f"- {role}: {state['notes'].strip()}"
        for (role, _), state in zip(SPECIALISTS, states, strict=True)
    )
    role, skills = EDITOR
    job = f"{TASK} Your colleagues wrote:\n{notes}\nSum this up in one sentence."
    show(
        agent.run(role=role, skills=skills, job=job, backend=endpoint),
        "notes",
        f"{role}  ({', '.join(skills)})",
    )


if __name__ == "__main__":
    main()
