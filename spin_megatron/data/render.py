"""The one renderer: prompts for generation and human answers for training come from the same template and tokenizer.

For a conversation that ends with the human answer,

    prompt text   = template(all but the answer, add_generation_prompt=True)      what theta_t is asked
    whole text    = template(all turns)                                           must start with the prompt text
    answer        = what the whole text has beyond the prompt, cut right after its first EOS

so y is scored under exactly the prompt that y' was sampled from, and both end alike: with one EOS, which the template
wrote or the model emitted; nothing after it (some templates add a newline) is part of an answer.

**Where the tokens are cut.** The whole text is tokenised at once, as supervised fine-tuning did, and the answer is what
follows the prompt's tokens. That needs the prompt's tokens to be a prefix of the whole's. Where a token would straddle the
boundary ("\n" + "\n" becomes "\n\n") they are not, and the model could never produce that token after the prompt that it
is given; the answer is then tokenised on its own, after a special token as a wall, and kept only if prompt and answer
decode to the whole text. Rows for which that fails, too, are skipped and counted.

**BOS** is written by the template or not at all: texts are tokenised without added special tokens.

A text that spells one of the tokenizer's special tokens would become that token (an EOS in the middle of an answer), so such
rows are skipped and counted.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spin_megatron.run.records import Message, PromptRow, SftExample, TokenIds

OverLong = Literal["drop", "truncate"]

# What happened to a row. The first four say why it was skipped, the last two what was cut.
Remark = Literal["special_token_text", "boundary", "over_long_prompt", "over_long_response", "truncated_prompt", "truncated_response"]

# Templates of Llama 3.1 and 3.2 write today's date into the system turn unless they are given one; this is their own
# fallback. With it a rerun tomorrow renders the same prompts.
_FIXED_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Limits:
    """Caps in tokens, EOS included. max_response_tokens is the cap of generation, too: equal for y and y'.

    over_long: "drop" leaves rows beyond a cap out. "truncate" keeps the end of a prompt (after BOS, if it starts with one)
    and the start of an answer, which thereby loses its EOS as a generated answer at the cap has none.
    """

    max_prompt_tokens: int
    max_response_tokens: int
    over_long: OverLong = "drop"


@dataclass(frozen=True)
class Rendered:
    """The outcome for one example: a row, or None where the remarks say why it was skipped."""

    row: PromptRow | None
    remarks: tuple[Remark, ...] = ()


class Renderer:
    """Chat template and tokenizer of one Hugging Face folder."""

    def __init__(self, folder: Path, *, eos_ids: Sequence[int], system: str | None = None) -> None:
        """Load the tokenizer; nothing is downloaded and no code from the folder runs.

        Args:
            eos_ids: every id that ends a response, the same as generation stops at.
            system: system turn for conversations that have none; "" is an empty system turn, None adds none.

        Raises:
            ValueError: there is no tokenizer that loads, or it has no chat template.
        """
        self.folder = folder
        self.eos_ids = frozenset(eos_ids)
        self._system = system
        self._tokenizer = _load_tokenizer(folder)
        # One int object an id, shared by all rows: 8 bytes a token instead of 36, 1 GB instead of 4 for 200k rows of 600 tokens.
        self._ids = tuple(range(max(self._tokenizer.get_vocab().values()) + 1))
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer in {folder} has no chat template, so it is unknown how the model expects its prompts. Put the template "
                "that the model was fine-tuned with into chat_template.jinja of that folder (its model card or a sibling model has it), "
                "or set model.path to an instruction-tuned model."
            )
        special = {*self._tokenizer.all_special_tokens, *self._tokenizer.convert_ids_to_tokens(sorted(self.eos_ids))}
        special |= {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        # Longest first: of two specials of which one starts the other, the longer is meant.
        self._special = re.compile("|".join(re.escape(token) for token in sorted(filter(None, special), key=len, reverse=True)) or r"(?!)")

    @property
    def bos_id(self) -> int | None:
        return self._tokenizer.bos_token_id  # type: ignore[no-any-return]

    @property
    def writes_the_time(self) -> bool:
        """Whether the template asks the clock, and not for a date_string: transformers hands it no function, so no clock can be set."""
        template = str(self._tokenizer.chat_template)
        return "strftime_now" in template and "date_string" not in template

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids with special tokens spelled out, for people."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def render(self, examples: Sequence[SftExample], limits: Limits) -> list[Rendered]:
        """Render a batch of examples, one outcome each, in order.

        Raises:
            ValueError: the template refuses a conversation, its prompt does not start its conversation, or it does not close
                answers with an EOS. All three are faults of the template or of a setting, so none is skipped.
        """
        texts = [self._texts(example) for example in examples]
        usable = [number for number, example in enumerate(examples) if not self._has_special_token(example.messages)]
        prompts = self._tokenize([texts[number][0] for number in usable])
        wholes = self._tokenize([texts[number][1] for number in usable])
        outcomes = [Rendered(None, ("special_token_text",))] * len(examples)
        for number, prompt_ids, whole_ids in zip(usable, prompts, wholes, strict=True):
            answer_ids = self._answer(texts[number], prompt_ids, whole_ids)
            if answer_ids is None:
                outcomes[number] = Rendered(None, ("boundary",))
            else:
                outcomes[number] = self._fit(examples[number].example_id, prompt_ids, self._cut_after_eos(answer_ids), limits)
        return outcomes

    def _texts(self, example: SftExample) -> tuple[str, str]:
        """Prompt text and whole text; the whole starts with the prompt."""
        messages = example.messages
        if self._system is not None and messages[0].role != "system":
            messages = (Message("system", self._system), *messages)
        prompt = self._apply(messages[:-1], example.example_id, add_generation_prompt=True)
        whole = self._apply(messages, example.example_id, add_generation_prompt=False)
        if not whole.startswith(prompt):
            common = next((place for place, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
            raise ValueError(
                f"the chat template in {self.folder} renders the prompt of example {example.example_id} otherwise than the start of its "
                f"conversation: after {prompt[max(0, common - 30) : common]!r} the prompt goes on with {prompt[common : common + 30]!r}, "
                f"the conversation with {whole[common : common + 30]!r}. Answers would be scored under another prompt than they were "
                "sampled from. Change chat_template.jinja so that add_generation_prompt appends what stands before an assistant turn."
            )
        return prompt, whole

    def _apply(self, messages: Sequence[Message], example_id: str, *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=_FIXED_DATE
            )
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise ValueError(
                f"the chat template in {self.folder} refuses example {example_id} (roles: {roles}): {error}. "
                "If it is the system turn, unset data.system and data.columns.system, or move its text into the data's first user turn."
            ) from error
        return str(text)

    def _has_special_token(self, messages: Iterable[Message]) -> bool:
        return any(self._special.search(message.content) for message in messages)

    def _tokenize(self, texts: list[str]) -> list[TokenIds]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(map(self._ids.__getitem__, token_ids)) for token_ids in encoded["input_ids"]]

    def _answer(self, texts: tuple[str, str], prompt_ids: TokenIds, whole_ids: TokenIds) -> TokenIds | None:
        """Tokens of what follows the prompt, or None where no cut at the boundary gives back the text."""
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return whole_ids[len(prompt_ids) :]
        prompt, whole = texts
        wall = self._tokenizer.eos_token or ""
        wall_ids, walled_ids, answer_ids = self._tokenize([wall, wall + whole[len(prompt) :], whole[len(prompt) :]])
        # After a special token no word-start mark is put before the text; alone, some tokenizers put one ("▁").
        for candidate in (walled_ids[len(wall_ids) :], answer_ids):
            if self.decode(prompt_ids + candidate) == self.decode(whole_ids):
                return candidate
        return None

    def _cut_after_eos(self, answer_ids: TokenIds) -> TokenIds:
        for place, token in enumerate(answer_ids):
            if token in self.eos_ids:
                return answer_ids[: place + 1]
        ends = {token: self._tokenizer.convert_ids_to_tokens(token) for token in sorted(self.eos_ids)}
        raise ValueError(
            f"the chat template in {self.folder} ends an answer with {self.decode(answer_ids[-3:])!r}, but generation stops at "
            f"{', '.join(f'{text} ({token})' for token, text in ends.items())}: the model could not learn to stop. Correct "
            "chat_template.jinja, or, if it is right, add the id of the token that ends answers to eos_token_id in generation_config.json."
        )

    def _fit(self, example_id: str, prompt_ids: TokenIds, answer_ids: TokenIds, limits: Limits) -> Rendered:
        remarks: list[Remark] = []
        cap = limits.max_prompt_tokens
        if len(prompt_ids) > cap:
            if limits.over_long == "drop":
                return Rendered(None, ("over_long_prompt",))
            has_bos = prompt_ids[0] == self.bos_id and cap > 1
            prompt_ids = (prompt_ids[0], *prompt_ids[1 - cap :]) if has_bos else prompt_ids[-cap:]
            remarks.append("truncated_prompt")
        truncated = len(answer_ids) > limits.max_response_tokens
        if truncated:
            if limits.over_long == "drop":
                return Rendered(None, ("over_long_response",))
            answer_ids = answer_ids[: limits.max_response_tokens]
            remarks.append("truncated_response")
        return Rendered(PromptRow(example_id, prompt_ids, answer_ids, truncated), tuple(remarks))


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"no tokenizer loads from {folder} ({reason}). The folder needs tokenizer.json and tokenizer_config.json, of a kind that runs "
            "without code of its own."
        ) from error
