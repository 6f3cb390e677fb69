"""One attention call: where its queries and keys sit (`geometry`), and the softmax over them (`softmax`)."""
