"""A model whose input can end its worker."""

from __future__ import annotations

KILLER = '''"""Echoes; one number ends the process at once, as a crash in native code would."""

import ctypes
import os
import time


class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        mood = float(inputs["x"].reshape(-1)[0])
        if mood > 600.0:
            time.sleep(0.3)  # in which the other model's LOAD ends, so that nothing else could be to blame
        if mood == 666.0:
            ctypes.string_at(0)
        if mood == 667.0:
            os._exit(3)
        return {"y": inputs["x"]}

    def unload(self):
        pass
'''
