"""Segments in SGLang's frontend language."""

from sglang_pic.lang.endpoint import PicRuntimeEndpoint, report_of
from sglang_pic.lang.segment import pic_segment, segment_ranges

__all__ = ["PicRuntimeEndpoint", "pic_segment", "report_of", "segment_ranges"]
