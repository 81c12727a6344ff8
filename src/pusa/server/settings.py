"""Load and validate the server's settings from a TOML file, the environment (PUSA_...) and the command line.

The command line wins over the environment, the environment over the file, the file over the defaults. A field
``queue_limit`` is ``queue_limit = 50`` in the file, ``PUSA_QUEUE_LIMIT=50`` in the environment and ``--queue-limit 50``
on the command line.
"""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Strict, model_validator

from pusa.acceleration.decisions import Compile, LoadOptions, Quantize, Wish
from pusa.fields import StrictModel, field
from pusa.provenance.options import MarkOptions
from pusa.request import METADATA, Metadata
from pusa.server.keys_file import check_key_lengths

_MIB, _GIB = 2**20, 2**30


StringList = Annotated[
    tuple[str, ...], Strict(False), BeforeValidator(lambda v: [v] if isinstance(v, str) and v else v or [])
]


class ServerSettings(StrictModel):
    """Settings of a server, and of workers beside it."""

    # Network and access
    host: str = field("127.0.0.1", "Address to listen on; one that others can reach needs an API key.", min_length=1)
    port: int = field(7860, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    api_keys: StringList = field(
        (), "Keys that clients must show one of.", unset="none: whoever reaches the port", repr=False
    )
    api_keys_file: str | None = field(None, "A file with one key a line; # begins a comment.", unset="none")
    insecure: bool = field(
        False, "Listen where others can reach it without a key: only behind something that asks for one."
    )
    allowed_hosts: StringList = field(
        (), "Names that clients may call the server by, such as videos.example.org.", unset="localhost and addresses"
    )
    allowed_origins: StringList = field(
        (), "Other web pages that may use the API from a browser, such as https://example.org.", unset="none"
    )
    root_path: str = field(
        "", "Path under which a reverse proxy shows the server, such as /pusa.", pattern=r"^(/[\w.~-]+)*$"
    )
    trusted_proxies: StringList = field(
        (), "Addresses of reverse proxies whose X-Forwarded headers are believed.", unset="none"
    )
    studio: bool = field(True, "Show the studio at /.")
    docs: bool = field(True, "Show the API's documentation at /docs.")
    metrics: bool = field(True, "Show figures for Prometheus at /metrics.")

    # Storage
    data: str | None = field(
        None, "Folder for jobs and files, on a local disk.", unset="~/.local/share/pusa", min_length=1
    )
    database: str | None = field(
        None,
        "The queue: sqlite:///FILE on a local disk, or postgresql://USER:PASSWORD@HOST/NAME for several machines.",
        unset="jobs.sqlite in the data folder",
        min_length=1,
        repr=False,
    )
    files: str | None = field(
        None,
        "Inputs and results: a folder, or a URL for fsspec such as s3://bucket/folder.",
        unset="files in the data folder",
        min_length=1,
        repr=False,
    )
    keep_hours: float | None = field(
        168.0, "How long results are kept; 0 keeps them for ever.", unit="hours", ge=0, le=87_600
    )
    housekeeping_seconds: float = field(
        600.0, "Time between two looks for expired results and orphaned files.", unit="seconds", ge=1, le=86_400
    )
    orphan_seconds: float = field(
        3600.0, "How old a file that belongs to no job must be to be removed.", unit="seconds", ge=60, le=604_800
    )
    min_free_bytes: int = field(_GIB, "Disk space below which new jobs are refused.", unit="bytes", ge=0, le=2**50)

    # Model and workers
    model: str = field(
        "mini", "The model: a name from `pusa models`, a Hugging Face repository or a folder.", min_length=1
    )
    lora: StringList = field((), "LoRA files to load instead of the model's own.", unset="the model's own")
    memory: Wish = field(
        "balanced",
        "How the model shares GPU memory: balanced takes exact weights unless they cannot run, fastest rounds them "
        "where that is faster, smallest takes the least memory.",
    )
    quantize: Quantize = field(
        "auto",
        "How the transformer's weights are stored: fp8 and int8 halve them and change videos a little, none keeps them "
        "exact; auto leaves it to memory.",
    )
    attention: str = field(
        "auto",
        "What computes attention: auto takes the fastest that is installed and runs on the card; or native, cudnn, "
        "flash3 and others of docs/speed.md.",
        min_length=1,
        max_length=40,
    )
    compile: Compile = field(
        "auto",
        "Compile the model, which makes each step faster and the first one of a new size a minute or two longer, once: "
        "auto does so on GPUs.",
    )
    workers: int = field(1, "Workers in this server; 0 where `pusa worker` runs elsewhere.", ge=0, le=64)
    executor: Literal["local", "ray"] = field(
        "local", "What runs the model: a process of its own on this machine, or an actor of a Ray cluster."
    )
    ray_address: str | None = field(
        None, "Address of the Ray cluster.", unset="the one that Ray finds, or a new local one"
    )
    gpus: int = field(
        0,
        "Cards that share each job of a worker; each worker has cards of its own. 0 leaves the number to the plan.",
        ge=0,
        le=64,
    )
    cpu_ranks: int = field(
        1,
        "For tests on a machine without a GPU: processes that share each job there, as cards would. It is no faster.",
        ge=1,
        le=8,
    )
    rank_seconds: float = field(
        120.0,
        "How long one of the processes that share a job may show no sign of life before all of them are killed; the "
        "job continues from its checkpoint.",
        unit="seconds",
        ge=2,
        le=3600,
    )
    ray_gpus: float = field(1.0, "GPUs that each of Ray's actors takes; 0 for a CPU.", ge=0, le=64)
    lease_seconds: float = field(
        60.0,
        "How long a worker may be silent before its job is given to another. Clocks of several machines must agree "
        "much better than this.",
        unit="seconds",
        ge=0.2,
        le=3600,
    )
    poll_seconds: float = field(0.5, "Time between two looks for new jobs.", unit="seconds", ge=0.01, le=60)
    max_failures: int = field(
        3, "Attempts in a row that get no further than the last checkpoint before a job fails.", ge=1, le=100
    )
    backoff_seconds: float = field(
        2.0,
        "Pause before a failed attempt is repeated; it doubles with each one in a row that gets no further.",
        unit="seconds",
        ge=0,
        le=3600,
    )
    checkpoint_steps: int = field(
        5, "Denoising steps between two checkpoints, from which a job goes on after a crash.", ge=1, le=200
    )
    checkpoint_seconds: float = field(
        10.0, "Least time between two checkpoints, so that quick steps are not held up.", unit="seconds", ge=0, le=3600
    )
    preview_seconds: float = field(
        2.0, "Least time between two previews of a running job; 0 makes none.", unit="seconds", ge=0, le=3600
    )
    preview_decoder: str | None = field(
        None,
        "A tiny decoder (taew2_1.safetensors or another TAEHV file) for sharper previews.",
        unset="a linear map",
        min_length=1,
    )
    cancel_seconds: float = field(
        10.0, "How long a cancelled job may take to stop before its process is killed.", unit="seconds", ge=0.1, le=600
    )
    load_seconds: float = field(
        3600.0,
        "How long loading the model may take before its process is started anew.",
        unit="seconds",
        ge=1,
        le=86_400,
    )
    stall_seconds: float = field(
        1800.0,
        "How long a running job may be silent before its process is taken for hung and killed; a step, and the "
        "decoding, must fit.",
        unit="seconds",
        ge=1,
        le=86_400,
    )
    job_seconds: float = field(86_400.0, "How long one attempt at a job may take.", unit="seconds", ge=1, le=2_592_000)
    shutdown_seconds: float = field(
        10.0,
        "How long requests that are being answered may take when the server is asked to stop; jobs go on later.",
        unit="seconds",
        ge=0,
        le=3600,
    )

    # Limits for clients
    queue_limit: int = field(100, "Jobs that may wait or run at once; more are answered with 429.", ge=1, le=1_000_000)
    key_queue_limit: int = field(20, "The same for each API key.", ge=1, le=1_000_000)
    key_stream_limit: int = field(200, "Event streams of one API key at once.", ge=1, le=60_000)
    retry_window_seconds: float = field(
        600.0,
        "How long a request that a client sends again after a lost answer is known to be the same.",
        unit="seconds",
        ge=0,
        le=86_400,
    )
    max_connections: int = field(
        2000,
        "Connections at once; those that wait longest make room for new ones. Fewer where the process may open too few "
        "files.",
        ge=16,
        le=60_000,
    )
    max_connections_per_address: int = field(
        200,
        "The same for each address; trusted proxies and this machine stand for many and are not counted.",
        ge=1,
        le=60_000,
    )
    head_seconds: float = field(
        20.0, "How long a client may take to send the head of a request.", unit="seconds", ge=0.1, le=3600
    )
    silent_seconds: float = field(
        30.0,
        "How long a client may send nothing of a body, or take nothing of an answer; a body comes at 1 KiB a second or "
        "more.",
        unit="seconds",
        ge=0.1,
        le=3600,
    )
    max_body_bytes: int = field(128 * _MIB, "Of a request, with its uploads.", unit="bytes", ge=1024, le=2**40)
    max_text_memory_bytes: int = field(
        256 * _MIB,
        "Memory for the bodies of all requests that hold files in base64; more are answered with 503.",
        unit="bytes",
        ge=64 * _MIB,
        le=2**40,
    )
    max_uploads: int = field(16, "Files in a request.", ge=1, le=64)
    max_upload_pixels: int = field(
        110_000_000,
        "Of an uploaded image; of a frame of a video, at most 36000000 of them.",
        unit="pixels",
        ge=256,
        le=2**30,
    )
    max_upload_seconds: float = field(120.0, "Length of an uploaded video.", unit="seconds", ge=0.1, le=86_400)
    max_upload_frames: int = field(4801, "Frames of an uploaded video.", ge=1, le=1_000_000)
    probe_seconds: float = field(10.0, "Time to look at the uploads of a request.", unit="seconds", ge=0.5, le=600)
    probe_memory_bytes: int = field(_GIB, "Memory to look at an upload.", unit="bytes", ge=64 * _MIB, le=2**40)
    cut_seconds: float = field(60.0, "Time to cut a piece out of a video.", unit="seconds", ge=0.5, le=3600)
    key_file_bytes: int = field(
        20 * _GIB, "Of the files that one API key keeps; 0 sets no limit.", unit="bytes", ge=0, le=2**50
    )
    max_video_pixels: int = field(
        2048 * 2048, "Width times height of a video to make.", unit="pixels", ge=256, le=2048 * 2048
    )
    max_video_frames: int = field(4801, "Frames of a video to make.", ge=1, le=4801)
    max_steps: int = field(200, "Denoising steps of a video to make.", ge=1, le=200)
    image_url_hosts: StringList = field(
        (), "Hosts that images may be fetched from by https; data: URLs are always taken.", unset="none"
    )

    # Marks of results
    metadata: Metadata = field(
        "full",
        "The most that a result tells of itself, and what it tells where a client asks for nothing: full (the request "
        "and small inputs), minimal (made with AI, the model, the version) or off. Clients may ask for less.",
    )
    require_mark: bool = field(False, "Refuse requests with metadata=off: every result says that it was made with AI.")
    sign_cert: str | None = field(
        None,
        "Certificate (PEM, with its chain) to sign results with (C2PA), on the machine of each worker.",
        unset="not signed",
        min_length=1,
    )
    sign_key: str | None = field(None, "The certificate's private key.", unset="none", min_length=1)
    timestamp_url: str | None = field(
        None, "Time stamp authority, so that signatures outlive the certificate.", unset="none is asked", min_length=1
    )
    watermark: str | None = field(
        None, "Watermark in the pixels of results: rivagan, or videoseal:FILE.", unset="none", min_length=1
    )

    # Help with prompts
    prompt_url: str | None = field(
        None,
        "OpenAI-compatible address that enhances and translates prompts, such as http://127.0.0.1:11434/v1; prompts "
        "of visitors go there, and nowhere else.",
        unset="no enhancer",
        pattern=r"^https?://[^/@?#\s]+(/[^?#\s]*)?$",
    )
    prompt_model: str | None = field(None, "Name of the language model there.", unset="none", min_length=1)
    prompt_key: str | None = field(None, "Key for that address.", unset="none is sent", min_length=1, repr=False)
    prompt_seconds: float = field(
        30.0, "How long the language model may take for a prompt.", unit="seconds", ge=1, le=600
    )

    # Logging
    log_level: Literal["debug", "info", "warning", "error"] = field("info", "What is logged.")
    log_format: Literal["text", "json"] = field("text", "Lines for people, or JSON for programs.")

    @model_validator(mode="after")
    def _check_access(self) -> "ServerSettings":
        check_key_lengths(self.api_keys)
        if not (self.api_keys or self.insecure or self.is_loopback):
            raise ValueError(
                f"host={self.host} can be reached by others and there is no API key: set PUSA_API_KEYS or "
                "api_keys_file, or say insecure if something in front of it lets in whom it may"
            )
        return self

    @model_validator(mode="after")
    def _check_ranks(self) -> "ServerSettings":
        if self.executor == "ray" and (self.gpus > 1 or self.cpu_ranks > 1):
            name = "cpu_ranks" if self.cpu_ranks > 1 else "gpus"
            raise ValueError(
                f"{name}={getattr(self, name)} and executor=ray: only processes of one machine share a job; leave it "
                "out, or set executor=local on the machines with the cards"
            )
        return self

    @model_validator(mode="after")
    def _check_load_options(self) -> "ServerSettings":
        _ = self.load_options  # raises
        return self

    @model_validator(mode="after")
    def _check_marks(self) -> "ServerSettings":
        if self.require_mark and self.metadata == "off":
            raise ValueError("require_mark and metadata=off exclude each other: choose metadata=minimal or full")
        if (self.sign_cert is None) != (self.sign_key is None):
            missing = "sign_key" if self.sign_key is None else "sign_cert"
            raise ValueError(f"{missing} is missing: a certificate and its key are given together")
        return self

    @model_validator(mode="after")
    def _check_enhancer(self) -> "ServerSettings":
        if (self.prompt_url is None) != (self.prompt_model is None):
            missing = "prompt_model" if self.prompt_model is None else "prompt_url"
            raise ValueError(f"{missing} is missing: an address and the name of its language model are given together")
        return self

    @property
    def marks(self) -> MarkOptions:
        """The signature and the watermark of results."""
        return MarkOptions(
            sign_cert=self.sign_cert,
            sign_key=self.sign_key,
            timestamp_url=self.timestamp_url,
            watermark=self.watermark,
        )

    @property
    def load_options(self) -> LoadOptions:
        """The way in which workers load the model."""
        return LoadOptions(
            memory=self.memory,
            quantize=self.quantize,
            gpus=self.gpus or None,
            attention=self.attention,
            compile=self.compile,
        )

    def limit_metadata(self, asked: Metadata | None) -> Metadata:
        """Return what a result tells of itself: what a client asks for, within what the operator allows."""
        least: Metadata = "minimal" if self.require_mark else "off"
        allowed = max(asked or self.metadata, self.metadata, key=METADATA.index)
        return min(allowed, least, key=METADATA.index)

    @property
    def metadata_choices(self) -> list[Metadata]:
        """List what clients may ask for, from the most to the least."""
        allowed = METADATA[METADATA.index(self.metadata) :]
        return [choice for choice in allowed if choice != "off" or not self.require_mark]

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def keys_file(self) -> Path | None:
        """File of API keys, which is read again when it changes."""
        return None if self.api_keys_file is None else Path(self.api_keys_file).expanduser()

    @property
    def preview_decoder_file(self) -> Path | None:
        return None if self.preview_decoder is None else Path(self.preview_decoder).expanduser()

    @property
    def data_folder(self) -> Path:
        """Folder of jobs and files, unless `database` and `files` name other places."""
        if self.data is not None:
            return Path(self.data).expanduser().absolute()
        return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "pusa"

    @property
    def database_url(self) -> str:
        """URL of the database, for `JobQueue`."""
        return self.database or f"sqlite:///{self.data_folder / 'jobs.sqlite'}"

    @property
    def files_url(self) -> str:
        """Folder or URL of the files, for `FileStore`."""
        return self.files or str(self.data_folder / "files")

    @property
    def scratch_folder(self) -> Path:
        """Folder of this machine for incoming uploads and unfinished videos."""
        return self.data_folder / "scratch"

    @property
    def keep_seconds(self) -> float | None:
        """Time until results are removed; None keeps them."""
        return self.keep_hours * 3600 if self.keep_hours else None
