"""Commands: ``deepspeed launchers/train.py``, or ``deepspeed --module adala.launchers.train`` once installed."""
