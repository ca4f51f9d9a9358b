"""Nothing secret in what is shown."""

import pytest

from omniad_edge.credentials import without_credentials


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://admin:s3cret@10.0.0.5:554/ch1", "rtsp://***@10.0.0.5:554/ch1"),
        ("rtsp://admin@10.0.0.5/ch1", "rtsp://***@10.0.0.5/ch1"),
        ("rtsp://admin:p@ss@10.0.0.5/ch1", "rtsp://***@10.0.0.5/ch1"),
        ("rtsp://admin:s3/cret@10.0.0.5/ch1", "rtsp://***@10.0.0.5/ch1"),
        ("rtsp://10.0.0.5:554/line@3", "rtsp://10.0.0.5:554/line@3"),
        ("rtsp://10.0.0.5/line@3", "rtsp://10.0.0.5/line@3"),
        ("https://hook.example/x?token=abc&line=3", "https://hook.example/x?token=***&line=3"),
        ("https://hook.example/x?line=3&access_token=abc#y", "https://hook.example/x?line=3&access_token=***#y"),
        ("rtsp://10.0.0.5/user=admin_password=tlJw_channel=1", "rtsp://10.0.0.5/user=***"),
        ("rtsp://h/s?usr=a&pwd=b&channel=1", "rtsp://h/s?usr=***&pwd=***&channel=1"),
        ("http://h/?api_key=1&apiKey=2&x-auth=3&sig=4", "http://h/?api_key=***&apiKey=***&x-auth=***&sig=***"),
        (
            'gst:rtspsrc location=rtsp://a:b@h/s user-id=a user-pw="b c" ! x264enc key-int-max=25',
            "gst:rtspsrc location=rtsp://***@h/s user-id=*** user-pw=*** ! x264enc key-int-max=25",
        ),
        ("mqtts://u:p@one, then rtsp://v:q@two", "mqtts://***@one, then rtsp://***@two"),
        ("gige://Basler-22334455?exposure_us=800", "gige://Basler-22334455?exposure_us=800"),
        ("webcam:0", "webcam:0"),
    ],
)
def test_shown(address, shown):
    assert without_credentials(address) == shown
    assert without_credentials(shown) == shown
