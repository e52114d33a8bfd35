"""A predicted mask as a DICOM Segmentation that points to the film it was predicted from.

The object (PS3.3 A.51) is binary: pixels at or above the mask threshold, the very ones that the table and the pictures
show, and that Dice was reported for. FRACTIONAL would promise a probability that nobody has calibrated, and fewer
viewers show it. It has the film's own rows and columns, no frame of reference, since a projection has no place in
space, and points to the film's SOP instance. The modules of patient and study are carried over, so that it is filed
beside the film, and identifies the patient as that does; values in them that DICOM does not allow are left out.

    opacity   category (49755003, SCT, Morphologically Abnormal Structure), type (112001, DCM, Opacity) of CID 6104,
              Abnormal Opacity Finding or Feature, in (39607008, SCT, Lung)
    lung      category (91723000, SCT, Anatomical Structure), type (39607008, SCT, Lung)

It is labeled as for research use wherever a viewer may show it. Needs highdicom: pip install "cxr-tf[dicom]". Bridge et
al., "Highdicom: a Python Library for Standardized Encoding of Image Annotations and Machine Learning Model Outputs in
Pathology and Radiology", Journal of Digital Imaging 2022.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.config import RAISE, disable_value_validation
from pydicom.multival import MultiValue
from pydicom.sr.coding import Code
from pydicom.uid import UID
from pydicom.valuerep import DA, TM, PersonName, validate_value

from cxr_tf import __version__
from cxr_tf.errors import CxrError, nearest
from cxr_tf.files import replacing

NOTICE = "Research use, not a medical device"

_LUNG = Code("39607008", "SCT", "Lung")
_FINDINGS: dict[str, dict[str, Any]] = {
    "opacity": {
        "segment_label": "Opacity",
        "segmented_property_category": Code("49755003", "SCT", "Morphologically Abnormal Structure"),
        "segmented_property_type": Code("112001", "DCM", "Opacity"),
        "anatomic_regions": [_LUNG],
    },
    "lung": {
        "segment_label": "Lung",
        "segmented_property_category": Code("91723000", "SCT", "Anatomical Structure"),
        "segmented_property_type": _LUNG,
    },
}
_FAMILY = Code("123110", "DCM", "Artificial Intelligence")
_SERIES = 9000  # behind the study's own in a viewer's list
_POINTED_TO = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)
_PARSED = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}  # by highdicom, which fails on what is malformed


class SegmentationError(CxrError):
    """A film that no Segmentation can point to, or what writes one is missing."""


class SegmentationWriter:
    """Writes predicted masks as DICOM Segmentations (see the module's text).

    Args:
        finding: what the masks show: "opacity" or "lung".
        algorithm: name of the model.
        version: of the model: what tells it from others of that name.
        threshold: that the masks were made with, 0-1.

    Raises:
        SegmentationError: for another finding, or when highdicom is not installed.

    Example:
        >>> write = SegmentationWriter("opacity", algorithm="siim", version="3f2a", threshold=0.5)  # doctest: +SKIP
        >>> write(Path("film.dcm"), mask >= 0.5, Path("out/film.seg.dcm"))  # doctest: +SKIP
    """

    def __init__(self, finding: str, *, algorithm: str, version: str, threshold: float):
        if finding not in _FINDINGS:
            raise SegmentationError(
                f'a mask shows one of {", ".join(_FINDINGS)}.{nearest(finding, _FINDINGS)} Received: "{finding}"'
            )
        try:
            import highdicom
        except ModuleNotFoundError as error:
            raise SegmentationError(
                f'{error.name} is needed for --dicom and not installed: pip install "cxr-tf[dicom]"'
            ) from error
        self._finding, self._version = finding, version
        name = f"cxr_tf {algorithm}".encode("ascii", "replace").decode()[:64]  # whatever character set the film has
        self._algorithm = highdicom.AlgorithmIdentificationSequence(
            name=name,
            family=_FAMILY,
            version=f"{__version__} {version}",
            source="cxr_tf",
            parameters={"mask_threshold": f"{threshold:.6g}"},
        )

    def __call__(self, film: Path, found: np.ndarray, out: Path) -> None:
        """Writes the Segmentation of one film; the film is only read.

        Args:
            film: a DICOM file of one frame.
            found: bool `[rows, columns]`, in the film's own pixels.
            out: the file to write.

        Raises:
            SegmentationError: when nothing can point to the film: its header lacks what identifies it, or is malformed.
            WriteError: when `out` cannot be written.
        """
        with _quiet(), disable_value_validation():
            try:
                source = _valid(pydicom.dcmread(film, force=True, stop_before_pixels=True))
                if missing := [keyword for keyword in _POINTED_TO if not source.get(keyword)]:
                    raise SegmentationError(f"{film}: has no {', '.join(missing)}, so that nothing can point to it.")
                if wrong := [keyword for keyword in _POINTED_TO if not UID(str(source.get(keyword))).is_valid]:
                    raise SegmentationError(
                        f"{film}: its {', '.join(wrong)} is no UID, so that nothing can point to it."
                    )
                made = self._made(source, found)
            except OSError as error:
                raise SegmentationError(f"{film}: cannot be read ({error.strerror or error}).") from error
            except SegmentationError:
                raise
            except Exception as error:  # highdicom's and pydicom's, whose texts may quote the patient
                raise SegmentationError(
                    f"{film}: its header is not one that a Segmentation can be derived from ({type(error).__name__})."
                ) from error
            with replacing(out) as temporary:
                made.save_as(temporary)

    def _made(self, source: pydicom.Dataset, found: np.ndarray) -> pydicom.Dataset:
        import highdicom

        segment = highdicom.seg.SegmentDescription(
            segment_number=1,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=self._algorithm,
            **_FINDINGS[self._finding],
        )
        segment.SegmentDescription = NOTICE
        made = highdicom.seg.Segmentation(
            source_images=[source],
            pixel_array=found.astype(np.uint8),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            series_instance_uid=highdicom.UID(),
            series_number=_SERIES,
            series_description=f"cxr_tf {self._finding}. {NOTICE}",
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="cxr_tf",
            manufacturer_model_name="cxr_tf",
            software_versions=__version__,
            device_serial_number=self._version,
            content_label="RESEARCH_USE",
            content_description=NOTICE,
        )
        made.PatientOrientation = source.get("PatientOrientation")
        return made


def _valid(source: pydicom.Dataset) -> pydicom.Dataset:
    """What highdicom takes of a film: no malformed value, and nothing of space, which a projection has no place in."""
    taken = pydicom.Dataset()
    for tag in source.keys():  # noqa: SIM118  a malformed value is met when its element is taken out
        with suppress(Exception):
            element = source[tag]
            if element.keyword in _POINTED_TO or _conforms(element):
                taken.add(element)
    taken.SpecificCharacterSet = "ISO_IR 192"  # UTF-8: all is decoded by now, and highdicom knows not every set
    for keyword in _MAY_BE_EMPTY:
        if keyword not in taken:
            setattr(taken, keyword, None)
    # A spacing would need a slice's thickness beside it, which a projection has not; the film says its own.
    for keyword in ("FrameOfReferenceUID", "PixelSpacing"):
        taken.pop(keyword, None)
    return taken


def _conforms(element: pydicom.DataElement) -> bool:
    values = element.value if isinstance(element.value, MultiValue) else [element.value]
    for value in values:
        if isinstance(value, str | PersonName):  # numbers are parsed by now
            validate_value(element.VR, value, RAISE)  # raises ValueError
    if kind := _PARSED.get(element.keyword):
        kind(element.value or "")
    return element.keyword != "PatientSex" or element.value in (None, "", "M", "F", "O")


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings and logs of pydicom and highdicom quote what they complain of: the patient's name, for one."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
