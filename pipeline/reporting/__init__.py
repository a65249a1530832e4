"""The parts of the page of ``bevkd report``: what each section says, from runs to markup."""
