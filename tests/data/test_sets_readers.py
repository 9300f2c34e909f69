"""Each reader on small files in exactly the community's format, quirks included, which are
here; and on files that are wrong, which are reported in one line. Above 500 lines, since there is a
sample of each format."""

import json
import pickle

import pytest

from vtp_jax.data import sets
from vtp_jax.data.sets import Box, Row, parse
from vtp_jax.types import UserError


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".pkl"):
            path.write_bytes(pickle.dumps(content, 2))
            continue
        if not isinstance(content, str):
            content = json.dumps(content, ensure_ascii=False)
        path.write_text(content, encoding="utf-8")


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


MSRVTT = {
    "info": {"year": "2016"},
    "videos": [
        {"category": 9, "video_id": "video0", "start time": 137.72, "split": "train", "id": 0},
        {"category": 3, "video_id": "video1", "start time": 1.0, "split": "validate", "id": 1},
        {"category": 3, "video_id": "video2", "start time": 1.0, "split": "test", "id": 2},
    ],
    "sentences": [
        {"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
        {"caption": "a dog", "video_id": "video1", "sen_id": 1},
        {"caption": "a red car", "video_id": "video0", "sen_id": 2},
        {"caption": "a cat", "video_id": "video2", "sen_id": 3},
    ],
}
FROZEN = {
    "annotations": [
        {"caption": s["caption"], "id": s["sen_id"], "image_id": s["video_id"]}
        for s in MSRVTT["sentences"]
    ]
}
CAR = Row("video0", media=("video0",), captions=("a car is shown", "a red car"))
DOG = Row("video1", media=("video1",), captions=("a dog",))
CAT = Row("video2", media=("video2",), captions=("a cat",))

VRIPT = {
    "meta": {"video_id": "02toZL7p4_0", "num_clips": 2, "integrity": True},
    "data": {
        "02toZL7p4_0-Scene-001": {
            "video_id": "02toZL7p4_0",
            "clip_id": "02toZL7p4_0-Scene-001",
            "caption": {"shot_type": "close-up", "content": "A hand.", "scene_title": "Hand"},
            "voiceover": ["hello"],
        }
    },
}
SCENE = Row("02toZL7p4_0-Scene-001", media=("02toZL7p4_0-Scene-001",), captions=("A hand.",))
KINETICS = (
    "label,youtube_id,time_start,time_end,split\n"
    "testifying,---QUuC4vJs,84,94,train\n"
    '"air drumming",--nQbRBEz2s,104,114,train\n'
)
SSV2_LABELS = {"Holding something next to something": "1", "Closing something": "0"}
ACTIVITYNET = {
    "v_QOlSCBRmfWY": {
        "duration": 82.73,
        "timestamps": [[0.83, 19.86], [17.37, 60.81]],
        "sentences": ["A young woman is seen.", " She dances around."],
    }
}
DIDEMO = [
    {"annotation_id": 54, "description": "the dog runs", "times": [[0, 0], [0, 1]],
     "video": "54322086@N00_2408598493.avi", "num_segments": 6, "dl_link": "x"},
    {"annotation_id": 55, "description": "a ball", "times": [[5, 5]],
     "video": "12@N07_1.mov", "num_segments": 6, "dl_link": "x"},
    {"annotation_id": 56, "description": "it stops", "times": [[2, 2]],
     "video": "54322086@N00_2408598493.avi", "num_segments": 6, "dl_link": "x"},
]  # fmt: skip
DOG_VIDEO, BALL_VIDEO = "54322086@N00_2408598493.avi", "12@N07_1.mov"
VATEX = [
    {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["A boy", "a child"], "chCap": ["一个男孩"]}
]
VATEX_ROW = Row(
    "Ptf_2VRj-V0_000122_000132",
    media=("Ptf_2VRj-V0_000122_000132",),
    whole=("Ptf_2VRj-V0",),
    span=(122, 132),
)
MC = ["a", "b", "c", "d", "e"]
QA = [
    {"answer": "couch", "category_id": 14, "id": 3, "question": "what is it?", "video_id": 6513},
    {"answer": "two", "category_id": 14, "id": 4, "question": "how many?", "video_id": 7},
]
TGIF = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\n"
QVH = {"qid": 9769, "query": "some military", "duration": 6, "vid": "j7_rJ-3x_360.0_510.0"}
QVH_ROW = Row(
    "9769",
    media=("j7_rJ-3x_360.0_510.0",),
    whole=("j7_rJ-3x",),
    span=(360, 510),
    captions=("some military",),
)

CASES = {
    "openvid/train": (
        {"OpenVid-1M.csv": "video,caption,aesthetic score,motion score,frame,fps,seconds\n"
         'a_0_0to24.mp4,"a man, ""old""\nand tired",5.1,0.2,24,24.0,1.0\n'},
        [Row("a_0_0to24.mp4", media=("a_0_0to24.mp4",), captions=('a man, "old"\nand tired',))],
    ),
    "vript/short": ({"vript_short_videos_captions.jsonl": lines(VRIPT)}, [SCENE]),
    "vript/long": ({"long/02toZL7p4_0_caption.json": VRIPT}, [SCENE]),
    "internvid/train": (
        {"InternVid-10M-flt.jsonl": lines(
            {"YoutubeID": "LLQHMbhtCA0", "Start_timestamp": "00:01:41.500",
             "End_timestamp": "00:01:47.000", "Caption": "a man", "UMT_Score": 0.4})},
        [Row("LLQHMbhtCA0_00:01:41.500_00:01:47.000",
             media=("LLQHMbhtCA0_00:01:41.500_00:01:47.000",), whole=("LLQHMbhtCA0",),
             span=(101.5, 107), captions=("a man",))],
    ),
    "panda70m/val": (
        {"panda70m_validation.csv": "videoID,url,timestamp,caption,matching_score\n"
         "--ab,https://x,\"[['0:00:13.013', '0:00:24.024'], ['1:00:00.0', '1:00:05.5']]\","
         "\"['a dog', \"\"it's a cat\"\"]\",\"[0.4, 0.5]\"\n"},
        [Row("--ab_00000", media=("--ab_00000",), whole=("--ab",), span=(13.013, 24.024),
             captions=("a dog",)),
         Row("--ab_00001", media=("--ab_00001",), whole=("--ab",), span=(3600, 3605.5),
             captions=("it's a cat",))],
    ),
    "webvid/val": (
        {"results_2M_val.csv": "videoid,contentUrl,duration,page_dir,name\n"
         "21179416,https://x/y.mp4,PT00H00M11S,006001_006050,Aerial shot\n"},
        [Row("21179416", media=("006001_006050/21179416",), captions=("Aerial shot",))],
    ),
    "kinetics400/val": (
        {"train.csv": KINETICS, "validate.csv": "label,youtube_id,time_start,time_end,split,is_cc\n"
         "testifying,-3B32lodo2M,5,15,validate,0\n"},
        [Row("-3B32lodo2M_000005_000015", media=("testifying/-3B32lodo2M_000005_000015",),
             whole=("-3B32lodo2M",), span=(5, 15), captions=("testifying",), label=1,
             name="testifying")],
    ),
    "kinetics700/test": (
        {"kinetics700/train.csv": KINETICS,
         "kinetics700/test.csv": "youtube_id,time_start,time_end,split\nx,10,20,test\n"},
        [Row("x_000010_000020", media=("x_000010_000020",), whole=("x",), span=(10, 20))],
    ),
    "ssv2/train": (
        {"something-something-v2-labels.json": SSV2_LABELS,
         "something-something-v2-train.json": [
             {"id": "78687", "label": "holding potato next to a bottle",
              "template": "Holding [something] next to [something]",
              "placeholders": ["potato", "a bottle"]}]},
        [Row("78687", media=("78687",), captions=("holding potato next to a bottle",), label=1,
             name="Holding something next to something")],
    ),
    "ssv2/test": (
        {"labels/labels.json": SSV2_LABELS, "labels/test.json": [{"id": "1420"}]},
        [Row("1420", media=("1420",))],
    ),
    "ucf101/train_1": (
        {"classInd.txt": "1 ApplyEyeMakeup\r\n2 YoYo\r\n",
         "trainlist01.txt": "YoYo/v_YoYo_g08_c01.avi 2\r\nApplyEyeMakeup/v_A_g08_c02.avi 1\r\n"},
        [Row("YoYo/v_YoYo_g08_c01.avi", media=("YoYo/v_YoYo_g08_c01.avi",), captions=("yo yo",),
             label=1, name="YoYo"),
         Row("ApplyEyeMakeup/v_A_g08_c02.avi", media=("ApplyEyeMakeup/v_A_g08_c02.avi",),
             captions=("apply eye makeup",), label=0, name="ApplyEyeMakeup")],
    ),
    "ucf101/test_3": (
        {"classInd.txt": "1 ApplyEyeMakeup\n2 YoYo\n", "testlist03.txt": "YoYo/v_YoYo_g01.avi\n"},
        [Row("YoYo/v_YoYo_g01.avi", media=("YoYo/v_YoYo_g01.avi",), captions=("yo yo",), label=1,
             name="YoYo")],
    ),
    "hmdb51/test_1": (
        {"brush_hair_test_split1.txt": "April_09_ba_goo_0.avi 1 \nb.avi 0 \nc#2.avi 2 \n",
         "wave_test_split1.txt": "w.avi 2 \n", "wave_test_split2.txt": "x.avi 2 \n"},
        [Row("brush_hair/c#2.avi", media=("brush_hair/c#2.avi",), captions=("brush hair",),
             label=0, name="brush_hair"),
         Row("wave/w.avi", media=("wave/w.avi",), captions=("wave",), label=1, name="wave")],
    ),
    "ava/train": (
        {"ava_train_v2.2.csv": "-5KQ,0902,0.077,0.151,0.283,0.811,80,1\n"
         "-5KQ,0902,0.077,0.151,0.283,0.811,9,1\n-5KQ,0902,0.5,0.1,0.6,0.8,9,0\n"
         "-5KQ,0903,,,,,,\n-5KQ,0904,0.1,0.1,0.2,0.2,9,0\n",
         "ava_train_excluded_timestamps_v2.2.csv": "-5KQ,0904\n"},
        [Row("-5KQ_0902", media=("-5KQ_0902",), whole=("-5KQ",), span=(900.5, 903.5),
             boxes=(Box(0.077, 0.151, 0.283, 0.811, (80, 9), 1), Box(0.5, 0.1, 0.6, 0.8, (9,), 0))),
         Row("-5KQ_0903", media=("-5KQ_0903",), whole=("-5KQ",), span=(901.5, 904.5))],
    ),
    "msrvtt/train_9k": (
        {"MSRVTT_data.json": MSRVTT, "MSRVTT_train.9k.csv": "video_id\nvideo1\nvideo0\n"},
        [DOG, CAR],
    ),
    "msrvtt/train_7k": (
        {"MSR_VTT.json": FROZEN, "train_list_7k.txt": "video0\n"}, [CAR],
    ),
    "msrvtt/test_1k": (
        {"MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\n"
         "ret0,msr9770,video9770,a person is connecting something to system\n"},
        [Row("video9770", media=("video9770",),
             captions=("a person is connecting something to system",))],
    ),
    "msrvtt/test_1k_index": (
        {"annotation/MSR_VTT.json": FROZEN, "lists/val_list_jsfusion.txt": "video0\nvideo1\n",
         "lists/jsfusion_val_caption_idx.pkl": {"video0": 1, "video1": 0}},
        [CAR._replace(captions=("a red car",)), DOG],
    ),
    "msrvtt/test_1kb": (
        {"MSRVTT_data.json": MSRVTT, "test_list_miech.txt": "video0\n"},
        [CAR._replace(captions=("a car is shown",))],
    ),
    "msrvtt/val_full": ({"train_val_videodatainfo.json": MSRVTT}, [DOG]),
    "msrvtt/test_full": ({"MSR_VTT.json": FROZEN, "test_list_full.txt": "video2\n"}, [CAT]),
    "msrvtt/test_1k_vindlu": (
        {"msrvtt_ret_test1k.json": [{"video": "video7020.mp4", "caption": "a cake"},
                                    {"video": "video7.mp4", "caption": ["b", "c"]}]},
        [Row("0", media=("video7020.mp4",), captions=("a cake",)),
         Row("1", media=("video7.mp4",), captions=("b", "c"))],
    ),
    "msvd/test": (
        {"raw-captions.pkl": {"-4wsuPCjDBc_5_15": [["a", "squirrel", "eats"], ["nuts"]]},
         "test_list.txt": "-4wsuPCjDBc_5_15\n"},
        [Row("-4wsuPCjDBc_5_15", media=("-4wsuPCjDBc_5_15",),
             captions=("a squirrel eats", "nuts"))],
    ),
    "didemo/train": (
        {"train_data.json": DIDEMO},
        [Row(DOG_VIDEO, media=(DOG_VIDEO,), captions=("the dog runs it stops",)),
         Row(BALL_VIDEO, media=(BALL_VIDEO,), captions=("a ball",))],
    ),
    "didemo/val": (
        {"val_data.json": DIDEMO, "val_list.txt": "12@N07_1\n"},
        [Row(BALL_VIDEO, media=(BALL_VIDEO,), captions=("a ball",))],
    ),
    "didemo_moments/test": (
        {"test_data.json": DIDEMO[:1]},
        [Row("54", media=(DOG_VIDEO,), captions=("the dog runs",), moments=((0, 5), (0, 10)))],
    ),
    "lsmdc/test": (
        {"LSMDC16_challenge_1000_publictect.csv":
         "1004_Juno_00.58.46.362-00.58.49.836\t00.58.46.300\t00.58.49.836\t0.0\t0.0\tSOMEONE, "
         'the "boss", nods.\n'},
        [Row("1004_Juno_00.58.46.362-00.58.49.836",
             media=("1004_Juno/1004_Juno_00.58.46.362-00.58.49.836",),
             captions=('SOMEONE, the "boss", nods.',))],
    ),
    "activitynet/val_1": (
        {"val_1.json": ACTIVITYNET, "val_2.json": {}},
        [Row("v_QOlSCBRmfWY", media=("v_QOlSCBRmfWY", "QOlSCBRmfWY"),
             captions=("A young woman is seen. She dances around.",))],
    ),
    "activitynet_moments/val_2": (
        {"val_2.json": ACTIVITYNET, "val_1.json": {}},
        [Row("v_QOlSCBRmfWY_0", media=("v_QOlSCBRmfWY", "QOlSCBRmfWY"),
             captions=("A young woman is seen.",), moments=((0.83, 19.86),)),
         Row("v_QOlSCBRmfWY_1", media=("v_QOlSCBRmfWY", "QOlSCBRmfWY"),
             captions=("She dances around.",), moments=((17.37, 60.81),))],
    ),
    "vatex/train_en": (
        {"vatex_training_v1.0.json": VATEX}, [VATEX_ROW._replace(captions=("A boy", "a child"))],
    ),
    "vatex/val_zh": (
        {"vatex_validation_v1.0.json": VATEX}, [VATEX_ROW._replace(captions=("一个男孩",))],
    ),
    "ssv2_label/test": (
        {"ssv2_ret_label_val_small.json": [{"video": "74225.webm", "caption": "spinning cube"}]},
        [Row("0", media=("74225.webm",), captions=("spinning cube",))],
    ),
    "ssv2_template/train": (
        {"ssv2_ret_template_train.json": [{"video": "1.webm", "caption": "Spinning something"}]},
        [Row("0", media=("1.webm",), captions=("Spinning something",))],
    ),
    "msrvtt_qa/val": (
        {"val_qa.json": QA[:1]},
        [Row("3", media=("video6513",), question="what is it?", answers=("couch",))],
    ),
    "msvd_qa/test": (
        {"test_qa.json": QA[1:], "youtube_mapping.txt": "-4wsuPCjDBc_5_15 vid1\nx_1_2 vid7\n"},
        [Row("4", media=("x_1_2", "vid7"), question="how many?", answers=("two",))],
    ),
    "tgif_qa/train_action": (
        {"Train_action_question.csv": TGIF
         + "tumblr_nk1_250\tWhat does it do 10 times ?\teat\thold\tfall\ttalk\tflap\t4\t7\t12\n"},
        [Row("tumblr_nk1_250_12", media=("tumblr_nk1_250",), question="What does it do 10 times ?",
             answers=("flap",), options=("eat", "hold", "fall", "talk", "flap"), label=4)],
    ),
    "tgif_qa/test_count": (
        {"Test_count_question.csv":
         "gif_name\tquestion\tanswer\tvid_id\tkey\ng\tHow often ?\t3\t1\t2\n"},
        [Row("g_2", media=("g",), question="How often ?", answers=("3",), label=3)],
    ),
    "tgif_qa/test_frameqa": (
        {"Test_frameqa_question.csv": "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\n"
         'g\twhat is on the "table" ?\t2\t1\tID1\t5\n'},
        [Row("g_5", media=("g",), question='what is on the "table" ?', answers=("2",))],
    ),
    "activitynet_qa/test": (
        {"test_q.json": [{"video_name": "1QIUV7WYKXg", "question": "is he alone",
                          "question_id": "v_1QIUV7WYKXg_3"}],
         "test_a.json": [{"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}]},
        [Row("v_1QIUV7WYKXg_3", media=("v_1QIUV7WYKXg", "1QIUV7WYKXg"), question="is he alone",
             answers=("yes",))],
    ),
    "msrvtt_mc/test": (
        {"msrvtt_mc_test.json": [{"video": "video7010.mp4", "caption": MC, "answer": 3}]},
        [Row("0", media=("video7010.mp4",), options=tuple(MC), answers=("d",), label=3)],
    ),
    "charades_sta/train": (
        {"charades_sta_train.txt": "AO8RW 0.0 6.9##a person puts a book on a shelf.\n"},
        [Row("AO8RW_0", media=("AO8RW",), captions=("a person puts a book on a shelf.",),
             moments=((0, 6.9),))],
    ),
    "tacos/val": (
        {"TACoS/val.json": {"s13-d21.avi": {"timestamps": [[50, 300]], "sentences": ["He cuts."],
                                            "fps": 25.0, "num_frames": 5000}}},
        [Row("s13-d21.avi_0", media=("s13-d21.avi",), captions=("He cuts.",), moments=((2, 12),))],
    ),
    "qvhighlights/val": (
        {"highlight_val_release.jsonl": lines(
            {**QVH, "relevant_windows": [[0, 2], [4, 6]], "relevant_clip_ids": [0, 2],
             "saliency_scores": [[4, 1, 1], [2, 3, 4]]})},
        [QVH_ROW._replace(moments=((0, 2), (4, 6)), saliency=(2, 0, 3))],
    ),
    "qvhighlights/test": ({"highlight_test_release.jsonl": lines(QVH)}, [QVH_ROW]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_format_is_read(tmp_path, name):
    files, rows = CASES[name]
    write(tmp_path, files)
    read = list(sets.read(*name.split("/"), tmp_path))
    assert [row._replace(origin="") for row in read] == rows
    assert {row.origin for row in read} == {name}
    split = sets.find(*name.split("/"))
    answers = split.vocabulary and any(row.answers for row in read)
    assert split.labelled == bool(answers or any(row.label is not None for row in read))


def test_every_reader_has_a_case():
    """One split at least of every set, and of every reader that a set has."""
    tried = {sets.find(*name.split("/")).read for name in CASES}
    tried_sets = {name.split("/")[0] for name in CASES} | {"finevideo", "kinetics600"}
    assert tried_sets == set(sets.SETS)
    for name, one in sets.SETS.items():
        for split in one.splits.values():
            read = getattr(split.read, "func", split.read)
            assert name == "finevideo" or read in {getattr(r, "func", r) for r in tried}


def test_other_names_of_files_are_accepted(tmp_path):
    write(tmp_path, {"msrvtt_mc_test.jsonl": lines(
        {"qid": 8, "clip_name": "video7010", "options": MC, "answer": 0})})  # fmt: skip
    (row,) = sets.read("msrvtt_mc", "test", tmp_path)
    assert (row.id, row.media, row.answers) == ("8", ("video7010",), ("a",))
    write(tmp_path, {"raw-captions.json": {"v_1_2": [["a"], "b c"]}, "val_list.txt": "v_1_2\n"})
    (row,) = sets.read("msvd", "val", tmp_path)
    assert row.captions == ("a", "b c")


def test_vindlus_lists_of_questions_are_read(tmp_path):
    row = {"question_id": 1, "question": "who?", "answer": "man", "video": "video7.mp4"}
    write(tmp_path, {"msrvtt_qa_test.json": [row]})
    (row,) = sets.read("msrvtt_qa", "test", tmp_path)
    assert (row.id, row.media, row.answers) == ("1", ("video7.mp4",), ("man",))


def test_ava_keeps_the_actions_that_are_listed(tmp_path):
    files, _ = CASES["ava/train"]
    for label in ('item {\n  name: "stand"\n  id: 80\n}', 'label {\n name: "s"\n label_id: 80\n}'):
        write(tmp_path, {**files, "ava_action_list_v2.2_for_activitynet_2019.pbtxt": label})
        first, second = sets.read("ava", "train", tmp_path)
        assert [box.actions for box in first.boxes] == [(80,)] and second.boxes == ()


def test_long_fields_of_panda_are_read(tmp_path):
    """Python's csv stops at 131,072 characters by itself."""
    captions, times = [f"'{'x' * 200}'"] * 1000, ["['0:00:00.000', '0:00:01.000']"] * 1000
    row = f'v,u,"[{", ".join(times)}]","[{", ".join(captions)}]"\n'
    write(tmp_path, {"panda70m_training_full.csv": f"videoID,url,timestamp,caption\n{row}"})
    assert len(list(sets.read("panda70m", "train_full", tmp_path))) == 1000


def test_finevideo_is_read_by_video_and_by_scene(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    from vtp_jax.data.sets import pretraining

    video = {
        "original_video_filename": "--a_b.mp4",
        "content_metadata": {
            "description": "A man cooks.",
            "qAndA": [{"question": "What?", "answer": "Rice."}],
            "scenes": [
                {
                    "title": "Start",
                    "activities": [{"description": "He washes."}, {"description": "He waits."}],
                    "timestamps": {"start_timestamp": "00:00:02", "end_timestamp": "00:01:00.5"},
                }
            ],
        },
    }
    table = pyarrow.table({"mp4": [b"bytes"], "json": [video]})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    (row,) = sets.read("finevideo", "train", tmp_path)
    assert (row.id, row.media, row.captions) == ("--a_b", ("--a_b",), ("A man cooks.",))
    (row,) = sets.read("finevideo", "scenes", tmp_path)
    assert (row.whole, row.span) == (("--a_b",), (2, 60.5))
    assert row.captions == ("Start", "He washes. He waits.")
    (row,) = sets.read("finevideo", "questions", tmp_path)
    assert (row.question, row.answers) == ("What?", ("Rice.",))
    file, out = tmp_path / "train-00000-of-00001.parquet", tmp_path / "videos"
    assert pretraining.extract_finevideo(file, out) == 1
    assert (out / "--a_b.mp4").read_bytes() == b"bytes"
    assert pretraining.extract_finevideo(file, out) == 0  # it is there already


WRONG = {
    "no column": ("msrvtt/test_1k", {"MSRVTT_JSFUSION_test.csv": "key,video\nret0,v\n"},
                  "line 2: has no 'video_id'; it has key, video"),
    "no file": ("msrvtt/test_1k", {}, "needs MSRVTT_JSFUSION_test.csv.*not below.*CLIP4Clip"),
    "other place": ("msrvtt/train_9k",
                    {"MSRVTT_data.json": MSRVTT, "MSRVTT_train.9k.csv": "video_id\nvideo9\n"},
                    "no caption of 'video9'; take both files from one place"),
    "no json": ("activitynet/train", {"train.json": "{"}, "train.json: is not JSON"),
    "no list": ("didemo/train", {"train_data.json": {}}, "is a dict; it must be a list"),
    "no object": ("activitynet/train", {"train.json": {"v_a": 3}}, "'v_a': is a int"),
    "times": ("didemo_moments/train", {"train_data.json": [{**DIDEMO[0], "times": [[1]]}]},
              r"entry 1: 'times' holds \[1\]; it must be \[start, end\]"),
    "uneven": ("activitynet_moments/train",
               {"train.json": {"v_a": {"timestamps": [[0, 1]], "sentences": ["a", "b"]}}},
               "2 sentences for 1 timestamps"),
    "class": ("kinetics400/val", {"train.csv": KINETICS, "val.csv": KINETICS.replace("air", "the")},
              "line 3: the class 'the drumming' is not in"),
    "template": ("ssv2/val",
                 {"labels.json": SSV2_LABELS,
                  "validation.json": [{"id": "1", "label": "x", "template": "Eating [x]"}]},
                 "the class 'Eating x' is not in"),
    "index": ("ucf101/train_2", {"classInd.txt": "1 A\n", "trainlist02.txt": "A/v.avi 2\n"},
              "line 1: 'A/v.avi 2' does not fit"),
    "code": ("hmdb51/train_1", {"a_test_split1.txt": "v.avi 3 \n"}, "must be a file and 0, 1 or 2"),
    "fields": ("lsmdc/val", {"LSMDC16_annos_val.csv": "a\tb\n"}, "2 fields; LSMDC has 6"),
    "no mark": ("charades_sta/test", {"charades_sta_test.txt": "A 0 1#x\n"}, "start end##sentence"),
    "seconds": ("charades_sta/test", {"charades_sta_test.txt": "A 0 x##x\n"}, "'x'; it must be a"),
    "answer": ("tgif_qa/test_action",
               {"Test_action_question.csv": TGIF + "g\tq\ta\tb\tc\td\te\t5\t1\t1\n"},
               "the answer is '5'; it must be a number from 0 to 4"),
    "no answer": ("activitynet_qa/val",
                  {"val_q.json": [{"video_name": "a", "question": "b", "question_id": "c"}],
                   "val_a.json": []}, "no answer to question 'c'"),
    "mapping": ("msvd_qa/val", {"val_qa.json": QA, "youtube_mapping.txt": "x vid1\n"},
                "entry 1: vid6513 is not in"),
    "box": ("ava/val", {"ava_val_v2.2.csv": "v,902,0.1,0.1,1.2,0.3,9,1\n"}, "out of the picture"),
    "lists": ("panda70m/test",
              {"panda70m_testing.csv": "videoID,timestamp,caption\nv,__import__('os'),x\n"},
              "line 2: 'timestamp' is .*it must be a list"),
    "clips": ("qvhighlights/train",
              {"highlight_train_release.jsonl": lines(
                  {**QVH, "relevant_windows": [[0, 2]], "relevant_clip_ids": [3],
                   "saliency_scores": [[1]]})}, "clip 3 is not one of the video's 3"),
    "set": ("msrvt/train_9k", {}, "no data set 'msrvt'; did you mean 'msrvtt'"),
    "split": ("msrvtt/train_9", {}, "msrvtt has no split 'train_9'; did you mean 'train_9k'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_errors_in_files_are_reported_in_one_line(tmp_path, kind):
    name, files, told = WRONG[kind]
    write(tmp_path, files)
    with pytest.raises(UserError, match=told) as error:
        list(sets.read(*name.split("/"), tmp_path))
    assert "\n" not in str(error.value)


def test_a_pickle_that_runs_code_is_rejected(tmp_path):
    evil = b"cos\nsystem\n(S'touch ran'\ntR."
    (tmp_path / "raw-captions.pkl").write_bytes(evil)
    (tmp_path / "test_list.txt").write_text("x\n")
    with pytest.raises(UserError, match="raw-captions.pkl: refers to Python's 'os.system'"):
        list(sets.read("msvd", "test", tmp_path))


@pytest.mark.parametrize("data", [b"\xff\xfe{", b'{"a": ' + b"[" * 100_000])
def test_damaged_files_are_rejected(tmp_path, data):
    files = dict(activitynet="train.json", internvid="InternVid-10M-flt.jsonl")
    for name, file in files.items():
        (tmp_path / file).write_bytes(data)
        with pytest.raises(UserError, match=f"{file}.* is not"):
            list(sets.read(name, "train", tmp_path))


def test_a_table_in_another_encoding_is_rejected(tmp_path):
    (tmp_path / "OpenVid-1M.csv").write_bytes("video,caption\na,café\n".encode("latin1"))
    with pytest.raises(UserError, match="OpenVid-1M.csv is not UTF-8 .line 2, byte 0xe9"):
        list(sets.read("openvid", "train", tmp_path))


def test_times_are_read_as_seconds():
    for text, value in (("1:00:01.5", 3601.5), ("00:02", 2), (3.5, 3.5), ("000122", 122)):
        assert parse.seconds(text, "x") == value
    for text in ("", "a", None, "1:nan", float("inf"), True):
        with pytest.raises(UserError, match="must be a number"):
            parse.seconds(text, "x")
