# SPDX-License-Identifier: Apache-2.0
"""Everloop's vLLM plug-in: LoRA adapters made fast on the CPU.

vLLM loads :func:`register` in each of its processes through the entry point group
``vllm.general_plugins``. Set ``VLLM_PLUGINS`` to a list without ``everloop_cpu_lora`` to
run vLLM as shipped.
"""

import logging

__version__ = "0.1.0"

SUPPORTED_VLLM = ("0.32.0",)
"""Versions of vLLM whose LoRA code this plug-in was written and tested against."""

# A child of vLLM's own logger, so that its handlers and its level apply.
_log = logging.getLogger("vllm.everloop")


def register() -> bool:
    """Install the CPU LoRA path where it fits; otherwise leave vLLM as shipped.

    Safe to call more than once in a process.

    Returns
    -------
    bool
        Whether the fast path is installed. When it is not, a warning says why.
    """
    import vllm
    from vllm.platforms import current_platform

    # A local suffix ("0.32.0+cpu") names a build of the same source.
    version = vllm.__version__.partition("+")[0]
    if version not in SUPPORTED_VLLM:
        supported = ", ".join(SUPPORTED_VLLM)
        _log.warning("everloop: vLLM %s is not supported (%s); LoRA as shipped", version, supported)
        return False
    if not current_platform.is_cpu():
        device = current_platform.device_type
        _log.warning("everloop: platform is %s, not CPU; LoRA as shipped", device)
        return False

    from everloop_vllm.compatibility import mismatch

    if (name := mismatch()) is not None:
        _log.warning("everloop: vLLM %s differs from what is supported (%s); LoRA as shipped", version, name)
        return False

    from everloop_vllm import cpu_lora, row_stacks

    cpu_lora.install()
    if row_stacks.LIBRARY is not None:
        _log.info("everloop: CPU LoRA grouped by adapter, in our own code for %d lanes", row_stacks.LANES)
    else:
        _log.warning(
            "everloop: CPU LoRA grouped by adapter, in torch's products: slower, as no C++ compiler with OpenMP "
            "was found at set-up. Install g++, remove .venv-engine/setup.stamp and run `make setup`."
        )
    return True
