"""Chat backends for teachers: a local transformers model, and any OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rerankkit.errors import ConfigError, PluginError, RunFailed
from rerankkit.text.clean import clean
from rerankkit.types import RunInfo
from rerankkit_gr2.asks import Failure, Reply, Request, read_reply

if TYPE_CHECKING:
    from rerankkit.lm import Policy


NO_KEY = "none"
"""What a server that wants no key is sent: the client insists on one."""


class TransformersBackend:
    """A chat model in this process: a Hub name, a folder, or a GGUF file in one. Loaded at the first ask."""

    def __init__(
        self, model: str, gguf_file: str | None = None, *, max_new_tokens: int = 400, batch_size: int = 8
    ) -> None:
        self.model = model
        self.gguf_file = gguf_file
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self._policy: Policy | None = None

    def ask(self, requests: Sequence[Request], info: RunInfo) -> Iterator[tuple[int, Reply | Failure]]:
        """Batch by batch; a prompt that does not fit the model's context is a failure."""
        import torch

        from rerankkit.lm import pretrained_policy, roll_out

        policy = self._policy = self._policy or pretrained_policy(self.model, self.gguf_file, device=info.device)
        provenance = {"backend": "transformers", "model": self.model}
        room = getattr(policy.model.config, "max_position_embeddings", None)
        for temperature, same in groupby(range(len(requests)), key=lambda i: requests[i].temperature):
            ids = list(same)
            for start in range(0, len(ids), self.batch_size):
                batch = [(i, _prompt(policy, requests[i])) for i in ids[start : start + self.batch_size]]
                fitting = [(i, p) for i, p in batch if room is None or len(p) + self.max_new_tokens <= room]
                for i, p in batch:
                    if (i, p) not in fitting:
                        yield i, Failure(f"a prompt of {len(p)} tokens and its answer do not fit {room}")
                if not fitting:
                    continue
                groups = roll_out(
                    policy,
                    [prompt for _, prompt in fitting],
                    1,
                    max_new_tokens=self.max_new_tokens,
                    temperature=temperature,
                    seeds=[requests[i].seed for i, _ in fitting],
                    autocast=torch.bfloat16 if info.precision == "bfloat16" else None,
                )
                for (i, _), (sample,) in zip(fitting, groups, strict=True):
                    yield i, read_reply(policy.decode(sample.token_ids), requests[i], provenance)


def _prompt(policy: Policy, request: Request) -> list[int]:
    return policy.prompt_ids([{"role": turn["role"], "content": turn["content"]} for turn in request.messages])


class OpenAIBackend:
    """Any server that speaks OpenAI's chat completions (vLLM, llama.cpp, SGLang, ...), many requests in flight.

    The key is read from the environment variable `api_key_env`; empty means that the server wants none. Answers come
    as they are ready. Rate limits, server errors and timeouts are tried again, `max_retries` times; what fails still,
    and what cannot be read, is a Failure. A server that refuses the key or the model, or cannot be reached at all,
    ends the run: it would refuse every other request too.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 32,
        timeout: float = 120.0,
        max_retries: int = 4,
        max_tokens: int = 1024,
    ) -> None:
        """`timeout` in seconds, for one try. Raises PluginError without the openai package."""
        try:
            import openai
        except ImportError as error:
            raise PluginError(
                "the teacher backend 'openai' needs the openai package, which is not installed; "
                "install it with: pip install 'rerankkit[openai]'"
            ) from error
        key = os.environ.get(api_key_env, "") if api_key_env else NO_KEY
        if not key:
            raise ConfigError(
                f"api_key_env: the environment variable {api_key_env!r} is not set; set it to the server's key, or "
                "set api_key_env to '' for a server that wants none"
            )
        self.model = model
        self.base_url = base_url
        self.concurrency = concurrency
        self.max_tokens = max_tokens
        self._key = key
        self._openai = openai
        self._client = openai.OpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=max_retries)

    def ask(self, requests: Sequence[Request], info: RunInfo) -> Iterator[tuple[int, Reply | Failure]]:
        """As the replies come in. Raises ConfigError if the server refuses us, RunFailed if it is not there."""
        unreached = 0
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="teacher")
        try:
            place = {pool.submit(self._one, request): i for i, request in enumerate(requests)}
            for future in as_completed(place):
                reply = future.result()
                unreached = unreached + 1 if isinstance(reply, _Unreached) else 0
                if unreached >= max(self.concurrency, min(8, len(requests))):
                    raise RunFailed(
                        f"teacher: {self.base_url} could not be reached {unreached} times in a row ({reply}); is the "
                        "server running? What was answered is kept: run again to go on."
                    )
                yield place[future], Failure(str(reply)) if isinstance(reply, _Unreached) else reply
        finally:  # also when the run is stopped: requests not yet sent are dropped
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Let go of the connections; the backend can't be asked again."""
        self._client.close()

    def _one(self, request: Request) -> Reply | Failure | _Unreached:
        openai = self._openai
        try:
            text = self._complete(request)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ConfigError(
                f"teacher: {self.base_url} refuses model {self.model!r} with this key: {self._told(error)}; see "
                "model, base_url and api_key_env"
            ) from None
        except openai.APIConnectionError as error:  # timeouts, too
            return _Unreached(self._told(error))
        except openai.OpenAIError as error:
            return Failure(f"{type(error).__name__}: {self._told(error)}")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            return Failure(f"the server's reply is no chat completion: {self._told(error)}")
        return read_reply(text, request, {"backend": "openai", "model": self.model})

    def _complete(self, request: Request) -> str:
        messages: Any = request.messages  # plain dictionaries; openai's own types are no wider
        completion = self._client.chat.completions.create(
            model=self.model,
            messages=messages,
            temperature=request.temperature,
            seed=request.seed % 2**31,
            max_tokens=self.max_tokens,
        )
        text = completion.choices[0].message.content
        if not isinstance(text, str):
            raise TypeError(f"its content is {type(text).__name__}")
        return text

    def _told(self, error: Exception) -> str:
        """What an error says, short, on one line, and without the key."""
        return clean(str(error).replace(self._key, "***") if self._key != NO_KEY else str(error), 40)


class _Unreached(str):
    """Why the server gave no answer at all."""
