MAGIC = 0xCA117ACE
TAG_SHIFT = 20


def run_tag(run_id: int) -> int:
    return (run_id & 0xFFF) or 1
