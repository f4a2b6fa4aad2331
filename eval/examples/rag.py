"""Questions over documents that a retriever returns in a different order each time.

    python -m eval.examples.rag [--url URL] [--chat-template NAME]

Start the server first: ``python -m sglang_pic.launch_server --model-path M``.
A prefix cache reuses nothing here behind the system prompt, since each prompt
opens with another document. With segments every document is computed once.
"""

from __future__ import annotations

from typing import Any

import sglang as sgl

from sglang_pic.lang import pic_segment

from .show import connect, show

DOCUMENTS = {
    "lighthouse": """\
Harbour record: the lighthouse of Veldra.
The lighthouse of Veldra stands on a black rock two miles off the coast. It was built in 1742 \
by the mason Ilse Harrow, who had lost a brother to the shoals the winter before. The tower is \
thirty-one metres tall and shows a green light, because the fishermen of the bay said that a \
white one looked like a low star. Its keeper rows ashore every second Sunday to buy lamp oil, \
bread and newspapers, and the school children ring a bell when they see the boat coming.
""",
    "glass": """\
Craft notes: glass from Tamsin.
The glass makers of Tamsin mix their sand with the ash of sea fern, which gives the bowls a \
faint purple colour. A bowl is blown in one breath, then cooled for nine days in a bed of warm \
salt. If it is taken out sooner it cracks at the first frost. The guild admits four apprentices \
a year, and each of them has to break a finished bowl in public before the guild gives them a \
pipe of their own. Most bowls are sold to the monasteries in the hills.
""",
    "ferry": """\
Travel guide: the Orrin ferry.
The ferry across Lake Orrin leaves from the stone pier at seven in the morning and at five in \
the afternoon. A ticket costs three copper marks, and a goat travels for one. The crossing takes \
fifty minutes in calm weather. In fog the captain, a woman called Brida Low, steers by the \
sound of a drum that is beaten on the far shore. Bicycles are welcome on the upper deck, but \
nobody may whistle on board, which the crew believes will wake the wind.
""",
    "beetle": """\
Field study: the marrow beetle.
The marrow beetle lives under the bark of old pear trees and is the size of a lentil. Its back \
is silver in spring and turns brown after the first rain of autumn. The beetle feeds on a fungus \
that it plants itself in small round chambers, and it weeds them every night. Farmers are fond \
of it, since a tree with marrow beetles seldom suffers from canker. One colony has about six \
hundred members and a single queen, who lives for eleven years.
""",
    "archive": """\
Visitor information: the Kessel archive.
The archive of Kessel keeps the letters of the salt merchants, some forty thousand of them, in \
drawers of cedar wood. Readers must wash their hands at the fountain and may use only pencils. \
The oldest letter is a complaint about late delivery, written on birch bark. On Thursdays the \
archive stays closed, because the cats that keep the mice away are weighed and examined then. \
Copies are made by hand and take a week; the fee is one jar of honey for every page.
""",
}

# What is asked, and the documents as the retriever ranked them.
QUESTIONS = [
    ("Who built the lighthouse of Veldra?", ["lighthouse", "ferry", "archive", "glass"]),
    ("How much does a ticket for the ferry cost?", ["ferry", "beetle", "lighthouse", "archive"]),
    ("On which day is the archive closed?", ["glass", "archive", "beetle", "ferry"]),
]


@sgl.function
def answer(s: Any, names: list[str], question: str) -> None:
    s += sgl.system("You answer questions from the documents you are given, in one sentence.")
    with s.user():
        for name in names:
            s += pic_segment(DOCUMENTS[name]) + "\n"
        s += "Question: " + question
    s += sgl.assistant(sgl.gen("answer", max_tokens=32, temperature=0))


def main() -> None:
    endpoint = connect(__doc__)
    for question, names in QUESTIONS:
        state = answer.run(names=names, question=question, backend=endpoint)
        show(state, "answer", f"{question}  ({', '.join(names)})")


if __name__ == "__main__":
    main()
