"""Chat templates: from a conversation and an answer to what the model is given and what it says."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from mpo_megatron.data.schema import Message, RecordError
from mpo_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_TURNS = 6
Turns = list[dict[str, str]]

_PROBE = "mpoprobe"  # an answer that no template has reason to change, easy to find in what it writes


class ChatTemplate:
    """A tokenizer's chat template; `end` is what it writes after an answer, through the end-of-turn token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", system_prompt: str | None) -> None:
        """Learns from one probe how the template writes an answer.

        Raises:
            ConfigError: the template refuses or leaves out the system prompt, has no generation prompt, or
                neither it nor the tokenizer has a token that ends a turn.
        """
        self._tokenizer = tokenizer
        self._system: Turns = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self._lead, self._written_end = self._learn_turn()
        self.end = self._written_end or self._eos_token()

    def prompt(self, messages: Sequence[Message], where: str) -> str:
        """The conversation up to where the model begins to speak. RecordError if the template refuses it."""
        return render(self._tokenizer, self._turns(messages), where)

    def answer(self, messages: Sequence[Message], prompt: str, text: str, where: str) -> tuple[str, bool]:
        """What the model says after `prompt`, without `end`, and whether the template writes the text so.

        Templates may strip the text and may put something before it (a space; an empty block of reasoning).
        If one rewrites it otherwise, such as by dropping the reasoning of past turns, the text itself is what
        the model said.
        """
        text = text.removesuffix(self.end.strip())  # samplers may leave the end-of-turn token in the text
        answered = [*self._turns(messages), {"role": "assistant", "content": text}]
        rendered = render(self._tokenizer, answered, where)
        if rendered.startswith(prompt):
            said = rendered[len(prompt) :]
            for body in (text, text.strip()):
                for lead in (self._lead, ""):
                    if said.startswith(lead + body + self._written_end):
                        return lead + body, True
        return text, False

    def _turns(self, messages: Sequence[Message]) -> Turns:
        turns = [asdict(message) for message in messages]
        return turns if turns[0]["role"] == "system" else self._system + turns

    def _learn_turn(self) -> tuple[str, str]:
        """What the template writes before an answer, and after it through the end-of-turn token."""
        question = [*self._system, {"role": "user", "content": "question"}]
        where = "system_prompt" if self._system else "a prompt of one user turn"
        try:
            prompt = render(self._tokenizer, question, where)
            answered = [*question, {"role": "assistant", "content": _PROBE}]
            whole = render(self._tokenizer, answered, where)
            without = self._tokenizer.apply_chat_template(
                question, tokenize=False, add_generation_prompt=False
            )
        except RecordError as error:
            raise ConfigError(str(error)) from None
        if not all(turn["content"].strip() in prompt for turn in self._system):
            raise ConfigError("the tokenizer's chat template leaves out system_prompt; remove it")
        before, found, after = whole.partition(_PROBE)
        if not found:
            raise ConfigError("the chat template leaves out answers; use another one")
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        if prompt == without and lead.strip():
            raise ConfigError(
                f"the tokenizer's chat template has no generation prompt: it writes {lead!r} before an "
                "answer, and nothing for add_generation_prompt=True; make it write the same there"
            )
        return lead, self._through_special_token(after)

    def _through_special_token(self, text: str) -> str:
        """`text` up to and including its first special token; empty if it has none."""
        added = self._tokenizer.added_tokens_decoder.values()
        special = {*self._tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return text[: min((text.index(token) + len(token) for token in special if token in text), default=0)]

    def _eos_token(self) -> str:
        if not self._tokenizer.eos_token:
            raise ConfigError("neither chat template nor tokenizer has an end-of-turn token; set eos_token")
        return str(self._tokenizer.eos_token)


def render(tokenizer: "PreTrainedTokenizerBase", turns: Turns, where: str) -> str:
    """The conversation as the chat template writes it, with the generation prompt unless its last turn is an answer.

    Raises RecordError if the template refuses it.
    """
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=turns[-1]["role"] != "assistant"
        )
    except Exception as error:  # a template is a program, and raises what it likes
        roles = ", ".join(turn["role"] for turn in turns[:_SHOWN_TURNS])
        roles += f" and {len(turns) - _SHOWN_TURNS} more" if len(turns) > _SHOWN_TURNS else ""
        fix = "remove the system message" if "system" in roles else "change the order of the turns"
        reason = " ".join(str(error).split())[:200]
        problem = f"the tokenizer's chat template refuses messages of {roles} ({reason}); {fix}"
        raise RecordError(where, problem, "template") from None
    assert isinstance(text, str)
    return text
